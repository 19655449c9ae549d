import { defineConfig, loadEnv } from "vite";

// The app's own backend is same-origin through this proxy. Requests to realtime are cross-origin.
export default defineConfig(({ mode }) => {
  const { BACKEND_URL = "http://127.0.0.1:8000" } = loadEnv(mode, ".", "");
  const proxy = { "/session": BACKEND_URL, "/chat": BACKEND_URL };
  return {
    server: { proxy },
    preview: { proxy },
    optimizeDeps: { include: ["react/jsx-dev-runtime"] }, // imported by compiled JSX, which Vite does not scan
  };
});
