"""What setup.py needs to build the native parts; never installed."""
