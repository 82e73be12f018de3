"""The command line. Every module here loads without torch; what needs torch imports it when it runs."""
