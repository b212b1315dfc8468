"""A bucket on this machine: `gcp-storage-emulator` on a free loopback port, with what only the real service has.

    python -m benchmarks.bucket_server [--delay=SECONDS]

prints the variables that make a command use it (`gs://tests/...`), and serves until its standard input ends. Added to
the emulator are conditional writes (`ifGenerationMatch`), requests side by side, a delay of each request, a list of
them, a place in the middle of an upload at which a test can stop a client, and what lay there after each request.
"""

import contextlib
import functools
import http.server
import logging
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

from data_pipelines import flags

BUCKET = 'tests'


class Server(http.server.ThreadingHTTPServer):
  """Serves one bucket from memory.

  Attributes:
    url: of the server.
    requests: (method, path with query, value of the header Range or '') of each request since `forget`.
    delay: seconds that are added to each request.
    most: requests that waited for that at a time.
    before_write: is called with the name of each object that is about to be written, in the thread of its request.
    history: the objects {name: data} after each request that changed them, while it is a list.
  """

  daemon_threads = True
  request_queue_size = 256

  def __init__(self):
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.handlers import buckets

    logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
    self.storage = emulator.Storage(use_memory_fs=True)
    self.storage._write_config_to_file = lambda: None  # writes all that it knows at each request
    buckets.create_bucket(BUCKET, self.storage)
    self.requests: list[tuple[str, str, str]] = []
    self.delay, self.most, self._waiting = 0.0, 0, 0
    self.before_write: Callable[[str], None] = lambda name: None
    self.history: list[dict[str, bytes]] | None = None
    self._lock = threading.Lock()
    super().__init__(('127.0.0.1', 0), functools.partial(_handler(emulator), self.storage))
    self.url = f'http://127.0.0.1:{self.server_address[1]}'

  def environment(self) -> dict[str, str]:
    """What makes gcsfs and TensorStore speak to this server, and to no other."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'abc',
      'NO_GCE_CHECK': 'true',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def forget(self) -> None:
    self.requests.clear()
    self.most = 0

  def wait(self) -> None:
    with self._lock:
      self._waiting += 1
      self.most = max(self.most, self._waiting)
    time.sleep(self.delay)
    with self._lock:
      self._waiting -= 1

  def names(self, prefix: str = '') -> list[str]:
    """The objects that lie in the bucket."""
    with self._lock:
      return sorted(n for n in self.storage.objects.get(BUCKET, {}) if n.startswith(prefix))

  def data(self, name: str) -> bytes:
    with self._lock:
      return self.storage.get_file(BUCKET, name)

  def everything(self) -> dict[str, bytes]:
    """{name: data} of all objects."""
    return {name: self.storage.get_file(BUCKET, name) for name in list(self.storage.objects.get(BUCKET, {}))}

  def wipe(self, objects: dict[str, bytes] | None = None) -> None:
    """Removes all objects, and puts these in their place."""
    self.delay, self.before_write, self.history = 0.0, lambda name: None, None
    with self._lock:
      self.storage.wipe(keep_buckets=True)
      for name, data in (objects or {}).items():
        self._put(name, data)
    self.forget()

  def put(self, name: str, data: bytes) -> None:
    """Writes an object as somebody else would."""
    with self._lock:
      self._put(name, data)

  def _put(self, name: str, data: bytes) -> None:
    from gcp_storage_emulator.handlers import objects

    described = objects._make_object_resource(self.url, BUCKET, name, 'application/octet-stream', len(data))
    self.storage.create_file(BUCKET, name, data, objects._checksums(data, described))


def _handler(emulator):
  read_body = emulator._read_raw_data
  emulator._read_raw_data = lambda handler: handler.body

  class Handler(emulator.RequestHandler):
    """One connection of a client, for many requests."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def handle_one_request(self):
      with contextlib.suppress(ConnectionError, ValueError):  # of a client that was killed
        super().handle_one_request()
        return
      self.close_connection = True

    def _route(self, method):
      server = self.server
      server.requests.append((method, self.path, self.headers.get('Range', '')))
      if server.delay:
        server.wait()
      self.body = read_body(self)  # all of it before the lock, and also where nobody wants it
      query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
      if method in ('POST', 'PUT') and '/upload/' in self.path:
        server.before_write((query.get('name') or [''])[0])
      with server._lock:
        router = emulator.Router(self)
        if self._refused(query):
          return
        self._generation = (self._object(query) or {}).get('generation')
        router.handle(method)
        if server.history is not None and method != 'GET':
          now = server.everything()
          if not server.history or now != server.history[-1]:
            server.history.append(now)

    def end_headers(self):
      if getattr(self, '_generation', None):
        self.send_header('x-goog-generation', self._generation)
        self._generation = None
      super().end_headers()

    def _refused(self, query) -> bool:
      """Answers 412 where the object is not of the generation that a write asks for; 0: there is none."""
      wanted = (query.get('ifGenerationMatch') or [None])[0]
      if wanted is None:
        return False
      there = self._object(query)
      if str(there['generation'] if there else 0) == wanted:
        return False
      self.send_response(412)
      self.send_header('Content-Length', '0')
      self.end_headers()
      return True

    def _object(self, query):
      """What is known of the object that a request is about."""
      name = (query.get('name') or [None])[0]
      if name is None and (of := re.search(r'/o/([^?]+)', self.path)):
        name = urllib.parse.unquote(of[1])
      return self.server.storage.objects.get(BUCKET, {}).get(name)

    do_GET = lambda self: self._route('GET')
    do_POST = lambda self: self._route('POST')
    do_PUT = lambda self: self._route('PUT')
    do_DELETE = lambda self: self._route('DELETE')
    do_PATCH = lambda self: self._route('PATCH')

  return Handler


@contextlib.contextmanager
def serving() -> Iterator[Server]:
  server = Server()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


def main() -> None:
  """The command line."""
  to = flags.parser('benchmarks.bucket_server', __doc__)
  to.add_argument('--delay', type=float, default=0.0, help='seconds that are added to each request (default: 0)')
  delay = flags.parse(to).delay
  with serving() as server:
    server.delay = delay
    for name, value in (server.environment() | {'EPATH_USE_TF': 'false'}).items():
      print(f'export {name}={value}')
    print(flush=True)
    sys.stdin.read()


if __name__ == '__main__':
  main()
