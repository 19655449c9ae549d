import { defineConfig, loadEnv } from "vite";

// `npm run dev` serves the page, and forwards the rest to the Python app.
export default defineConfig(({ mode }) => {
  const { BACKEND_URL = "http://127.0.0.1:8000" } = loadEnv(mode, ".", "");
  return {
    server: { proxy: { "/api": BACKEND_URL, "/realtime": BACKEND_URL } },
    build: { target: "es2022", chunkSizeWarningLimit: 1000 },
  };
});
