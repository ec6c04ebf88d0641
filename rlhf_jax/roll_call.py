"""Who is there, before JAX asks, and whether process 0 still is.

Where a process does not join, JAX ends the others with an abort that does not say which one. So each first says its index to
process 0. The connections stay: by theirs the others see when process 0 is gone, of which JAX says only that it was the
leader.
"""

import contextlib
import json
import os
import socket
import threading
import time

from rlhf_jax.errors import ProcessError

_others = []  # of process 0: a connection to each of the others, open as long as it lives
_GOODBYE = b'.'


def is_address(text):
  """Whether it is HOST:PORT."""
  host, _, port = text.rpartition(':')
  return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def hold(address, count, index, *, join_s, lost_s):
  """Returns when every process has said its index to process 0; raises ProcessError that names who did not, after `join_s`.

  It is held at the address where JAX's service listens next.
  """
  host, _, port = address.rpartition(':')
  deadline = time.monotonic() + join_s
  found = (_call(int(port), count, deadline) if index == 0 else
           _answer((host.strip('[]'), int(port)), index, deadline, lost_s))
  if found is None:
    raise ProcessError(f'process 0 does not answer at {address} after {join_s} s. Start it there, with the same flags but '
                       'for --processes.index 0, or mend the address.')
  if found:
    raise ProcessError(f'process {" and ".join(map(str, found))} of {count} did not join within {join_s} s. '
                       'Look at its own output, and start all of them together; --processes.join-s waits longer.')


def _call(port, count, deadline):
  """Process 0's side: the indices that are missing, which it tells those that came."""
  came = {}
  with _listen(port) as door, contextlib.ExitStack() as stack:
    while len(came) < count - 1 and (left := deadline - time.monotonic()) > 0:
      door.settimeout(left)
      with contextlib.suppress(OSError, ValueError):                            # what is no process of this run
        connection, _ = door.accept()
        stack.enter_context(connection)
        connection.settimeout(5)
        came[int(connection.makefile().readline())] = connection
    missing = sorted(set(range(1, count)) - set(came))
    _tell(came.values(), json.dumps(missing).encode() + b'\n')
    if not missing:
      stack.pop_all()
      _others[:] = came.values()
  return missing


def _listen(port):
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(('', port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
  except OSError as error:
    raise ProcessError(f'process 0 cannot listen at port {port} ({error.strerror}). Look for an older run that has it '
                       'still, or pass another port.') from error


def say_goodbye():
  """Process 0 has come to its end in good order."""
  _tell(_others, _GOODBYE)


def _tell(connections, what):
  for connection in connections:
    with contextlib.suppress(OSError):
      connection.sendall(what)


def _answer(address, index, deadline, lost_s):
  """The other side: the indices that are missing, or None where process 0 is."""
  while (left := deadline - time.monotonic()) > 0:
    with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
      connection = stack.enter_context(socket.create_connection(address, timeout=left))
      connection.sendall(f'{index}\n'.encode())
      connection.settimeout(left + 5)                                           # process 0 may have begun later
      missing = json.loads(connection.makefile().readline())
      if not missing:
        stack.pop_all()
        threading.Thread(target=_watch, args=(connection, index, lost_s), daemon=True).start()
      return missing
    time.sleep(0.2)
  return None


def _watch(connection, index, lost_s):
  """Says so where process 0 is gone without a goodbye; JAX ends this process at about the same time.

  A host that is switched off, or cut off, closes no connection: its silence is noticed after two thirds of `lost_s`, before
  JAX ends this process for it.
  """
  try:
    _notice_silence(connection, lost_s)
    if connection.recv(1) == _GOODBYE:
      return
    what = 'is gone'
  except ConnectionError:
    what = 'is gone'
  except OSError:
    what = 'has not answered for a while'
  os.write(2, f'process {index}: process 0 {what}, and the others end with it. Look at its own output, and start all of '
              'them again.\n'.encode())


def _notice_silence(connection, lost_s):
  """Lets what waits for a connection fail where nothing at its other end answers. Times are in whole seconds."""
  connection.settimeout(None)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  idle = 'TCP_KEEPIDLE' if hasattr(socket, 'TCP_KEEPIDLE') else 'TCP_KEEPALIVE'  # the latter on macOS
  for name, value in ((idle, lost_s // 3), ('TCP_KEEPINTVL', lost_s // 6), ('TCP_KEEPCNT', 2)):
    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))
