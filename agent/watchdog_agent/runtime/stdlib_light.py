"""`json`, `signal`, `socket` and some small things, without what the standard library's own modules load.

Those are Python around C: `socket` makes enumerations of its constants, `json` loads `re`, and so each agent
would have 1.2 MB more resident (bench/weight.py). Here is the C beneath them, where this Python has it as
CPython does; else, or where it does not do what is expected of it, the modules themselves. Type checkers see
only those.
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
