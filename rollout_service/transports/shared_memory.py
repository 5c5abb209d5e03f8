"""Transport through shared memory, on the service's own machine: the trainer writes a file and sends its name.

The service does not read the bytes. The engines verify their checksum when they read them.
"""

import asyncio
import uuid
from collections.abc import AsyncIterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rollout_service.protocol import SharedMemoryPush, WeightsOf
from rollout_service.transports.folder import WeightsFolder, make_writable
from rollout_service.transports.transport import Sent, Update, refused

CONTENT_TYPE = "application/json"
REFERENCE_LIMIT = 64 << 10
"""most bytes of a body that names a file"""


class SharedMemorySender:
    def __init__(self, folder: Path):
        """`folder` is the service's."""
        self.folder = folder

    @contextmanager
    def send(self, of: WeightsOf, parts: Sequence[memoryview]) -> Iterator[Sent]:
        from rollout_service.tensor_bytes import checksum_of

        file = self.folder / f"push-{uuid.uuid4().hex}.safetensors"
        try:
            with ThreadPoolExecutor(1) as pool:
                checksum = pool.submit(checksum_of, parts)
                write(make_writable(file, of), parts)
            yield Sent(SharedMemoryPush(file=file.name).model_dump_json().encode(), CONTENT_TYPE, checksum.result())
        finally:
            file.unlink(missing_ok=True)


def write(file: Path, parts: Sequence[memoryview]) -> None:
    """Write over what is in the file."""
    with file.open("r+b") as out:
        out.writelines(parts)
        out.truncate()


class SharedMemoryReceiver:
    def __init__(self, folder: WeightsFolder):
        self.folder = folder

    async def adopt(self, of: WeightsOf, body: AsyncIterable[bytes], checksum: str | None, limit: int) -> Update:
        from rollout_service.tensor_bytes import file_checksum

        file = self.take(SharedMemoryPush.model_validate_json(await read(body)).file)
        if checksum is None:
            checksum = await asyncio.to_thread(file_checksum, file)
        return Update(file, checksum)

    def take(self, name: str) -> Path:
        """A trainer's file in the folder under a name of ours. Under its own, the trainer could write over what is in
        service. Raises RefusedUpdate."""
        file = self.folder.new_file()
        try:
            (self.folder.path / name).rename(file)
        except FileNotFoundError:
            raise refused("file", f"no file {name!r} in {self.folder.path}") from None
        return file


async def read(body: AsyncIterable[bytes]) -> bytes:
    """The whole body. Raises RefusedUpdate (413) once it is larger than a reference can be; the rest is not read."""
    whole = bytearray()
    async for chunk in body:
        whole += chunk
        if len(whole) > REFERENCE_LIMIT:
            message = f"has more than {REFERENCE_LIMIT} bytes, and a push by reference needs fewer"
            raise refused("body", message, status=413)
    return bytes(whole)
