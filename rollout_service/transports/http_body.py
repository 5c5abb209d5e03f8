"""Transport over HTTP, from any machine: the request's body is the safetensors bytes, which the service stores."""

from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from blake3 import blake3

from rollout_service.protocol import WeightsOf
from rollout_service.transports.folder import WeightsFolder, make_writable
from rollout_service.transports.transport import Sent, Update, check_received, refused

CONTENT_TYPE = "application/octet-stream"
CHUNK = 1 << 20
"""bytes"""


class HttpSender:
    @contextmanager
    def send(self, of: WeightsOf, parts: Sequence[memoryview]) -> Iterator[Sent]:
        from rollout_service.tensor_bytes import checksum_of

        yield Sent(chunks(parts), CONTENT_TYPE, checksum_of(parts))


def chunks(parts: Iterable[memoryview]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield bytes(part[start : start + CHUNK])


class HttpReceiver:
    def __init__(self, folder: WeightsFolder):
        self.folder = folder

    async def adopt(self, of: WeightsOf, body: AsyncIterable[bytes], checksum: str | None, limit: int) -> Update:
        """The checksum is computed while the bytes arrive."""
        file = make_writable(self.folder.new_file(), of)
        received, hasher = 0, blake3()
        try:
            with file.open("r+b") as out:
                async for chunk in body:
                    received += len(chunk)
                    if received > limit:
                        message = f"has more than {limit} bytes, which these tensors cannot need"
                        raise refused("body", message, status=413)
                    hasher.update(chunk)
                    out.write(chunk)
                out.truncate()
            check_received(hasher.hexdigest(), checksum)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return Update(file, hasher.hexdigest())
