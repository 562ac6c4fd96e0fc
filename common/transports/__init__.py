"""Ways for frames to cross: tcp:// and ipc:// by ZeroMQ, memory (in process, for tests).

endpoint = transports.listen(["tcp://127.0.0.1:0"])          endpoint = transports.dial("tcp://host:5555")
"""

from common.transports.zeromq import ZeroMQEndpoint, dial, listen

__all__ = ["ZeroMQEndpoint", "dial", "listen"]
