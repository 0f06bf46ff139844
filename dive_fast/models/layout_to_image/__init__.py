"""The family "layout-to-image": denoisers that attend to an encoded layout."""
