"""`json`, `signal`, `socket` and some small functions, without the imports of the standard library's modules.

Those modules wrap C modules in Python: `socket` builds enumerations of its constants and `json` loads `re`, which
would add 1.2 MB per agent (bench/weight.py). This module exports the C modules if this Python has them as
CPython does, and otherwise, or if they do not behave as expected, the standard modules. Type checkers see only the
standard modules.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import heapq
    import json
    import signal
    import socket
    import struct
    from collections import deque
else:
    try:
        import _heapq as heapq
        import _signal as signal
        import _socket as socket
        import _struct as struct
        from _collections import deque
    except ImportError:
        import heapq
        import signal
        import socket
        import struct
        from collections import deque
    try:
        from watchdog_agent.runtime import json_light as json
    except Exception:  # whatever is different in this Python
        import json

__all__ = ["deque", "heapq", "json", "signal", "socket", "struct"]
