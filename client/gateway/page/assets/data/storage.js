// The browser's storage, which may be forbidden or full: then a value lives as long as the page.

function over(name) {
  const memory = new Map();
  const store = () => {
    try {
      return globalThis[name];
    } catch {
      return null;
    }
  };
  return {
    get(key) {
      try {
        return store()?.getItem(key) ?? memory.get(key) ?? null;
      } catch {
        return memory.get(key) ?? null;
      }
    },
    set(key, value) {
      memory.set(key, value);
      try {
        store()?.setItem(key, value);
      } catch {
        // Kept in memory.
      }
    },
    remove(key) {
      memory.delete(key);
      try {
        store()?.removeItem(key);
      } catch {
        // Nothing was stored.
      }
    },
  };
}

/** For this tab, until it closes. */
export const tab = over("sessionStorage");
/** For this browser; holds the theme alone. */
export const browser = over("localStorage");
