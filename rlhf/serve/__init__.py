"""The API, its scheduler and its page. Imported by serve.py alone; deletable with one directory."""
