"""Research scripts: was it worth it? They may import anything, nothing imports them, and they are
not installed.
"""

import decoding.support.early  # noqa: F401  # before what takes seconds to import
