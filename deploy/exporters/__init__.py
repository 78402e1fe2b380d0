"""Writing a detector in the forms that other runtimes read; one file a form."""
