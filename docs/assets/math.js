// Renders what pymdownx.arithmatex marked as mathematics, with the copy of KaTeX beside this file; no network is needed.
document$.subscribe(() => {
  for (const node of document.querySelectorAll(".arithmatex")) {
    const text = node.textContent.trim();
    const display = text.startsWith("\\[");
    katex.render(text.slice(2, -2), node, { displayMode: display, throwOnError: false });
  }
});
