"""How the page looks. Fonts are those of the reader's machine: none is fetched."""

from __future__ import annotations

import gradio as gr

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important;
  min-width: 0; }
.fillable { max-width: 100% !important; }
h1 { font-size: 1.5rem !important; margin: 0.4rem 0 0.2rem !important; overflow-wrap: anywhere; }
.told { font-size: 1.1rem; margin: 0 !important; padding: 0.6rem 0.8rem; border-radius: 6px;
  border-left: 4px solid var(--border-color-primary); background: var(--background-fill-secondary);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.told.running { border-left-color: #2563eb; }
.told.stopped { border-left-color: #b45309; }
.told.done { border-left-color: #15803d; font-weight: 600; }
.told.error { border-left-color: #b91c1c; }
.note { font-size: 0.9rem; color: var(--body-text-color-subdued); margin: 0.2rem 0;
  overflow-wrap: anywhere; }
/* Small pictures fill their frame. */
#picture img, #drawn img { width: 100%; height: 100%; object-fit: contain; }
.rows { overflow-x: auto; }
.rows thead, .rows tbody, .rows tr { border: 0 !important; }
.rows table { width: 100%; border: 0 !important; border-collapse: collapse; margin: 0;
  font-size: 0.85rem; }
.rows caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
.rows table th, .rows table td { padding: 0.3rem; text-align: right; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary);
  font-variant-numeric: tabular-nums; }
.rows table td:last-child { padding-left: 0.8rem; }
.rows table th:first-child, .rows table td:last-child { text-align: left; }
.rows table tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 4.5rem; }
.where { margin: 0; max-width: 26rem; }
.where figcaption { font-weight: 600; font-size: 0.85rem; padding: 0.3rem 0;
  overflow-wrap: anywhere; }
.where img { width: 100%; height: auto; margin: 0; image-rendering: auto; }
.where .red, .where .blue { display: inline-block; width: 0.8em; height: 0.8em; }
.where .swatch { white-space: nowrap; }
.where .red { background: #dc2626; }
.where .blue { background: #2563eb; }
.html-container { padding: 0 !important; }
.examples button, .examples button * { width: 3.6rem !important; height: 3.6rem !important; }
.examples img { object-fit: cover; }
"""

# Gradio's examples are pictures without a text; a screen reader gets the names of the files.
JS = """
() => {
  const name = () => {
    for (const item of document.querySelectorAll(".examples .gallery-item:not([aria-label])")) {
      const src = item.querySelector("img")?.getAttribute("src");
      if (src) item.setAttribute("aria-label", decodeURIComponent(src.split("/").pop()));
    }
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}
"""


def theme() -> gr.themes.Base:
    base = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=list(_SANS), font_mono=list(_MONO)
    )
    # Small print at a contrast of at least 4.5 to 1, on light ground and on dark.
    subdued = {"light": "*neutral_600", "dark": "*neutral_300"}
    return base.set(
        body_text_color_subdued=subdued["light"],
        body_text_color_subdued_dark=subdued["dark"],
        block_label_text_color=subdued["light"],
        block_label_text_color_dark=subdued["dark"],
        block_title_text_color=subdued["light"],
        block_title_text_color_dark=subdued["dark"],
        block_info_text_color=subdued["light"],
        block_info_text_color_dark=subdued["dark"],
    )
