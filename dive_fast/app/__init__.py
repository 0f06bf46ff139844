"""A page to try a model on, served to the browser of this machine; needs gradio."""
