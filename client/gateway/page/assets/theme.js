// Dark or light before the first paint: a classic script in the head, since modules run later.

(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("raceme-theme");
  } catch {
    // Storage is forbidden here: the system's choice stands.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
