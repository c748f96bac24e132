"""Research scripts: was it worth it? They may import anything, nothing imports them, and they are
not installed.
"""
