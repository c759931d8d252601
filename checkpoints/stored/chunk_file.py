"""One chunk's file of a converted folder: read whole, and held against its checksum."""

from dataclasses import dataclass

import numpy as np

from checkpoints.files.place import Place, digest, read_into, size
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored.chunk_grid import ChunkGrid


@dataclass(frozen=True)
class ChunkFile:
    """File `number` of the array in `folder`: all of the published tensor `name`, or its rows from `row` on."""

    name: str
    folder: Place
    number: int
    grid: ChunkGrid
    stacked: bool
    sha256: str

    @property
    def file(self) -> Place:
        return self.folder / self.grid.file(self.number)

    @property
    def row(self) -> int:
        """The first of the tensor's rows that the file has."""
        return 0 if self.stacked or not self.grid.counts else self.grid.index(self.number)[0] * self.grid.chunk[0]

    @property
    def nbytes(self) -> int:
        """The memory that reading takes: the file, and the chunk put together."""
        return 2 * self.grid.file_bytes

    def read(self, *, check: bool = False) -> np.ndarray:
        """Returns the tensor's rows. Raises CheckpointError naming file and tensor where the file is not there, cut
        short, or has another index of its parts, and on `check` where its values are not those that were converted."""
        file, expected = self.file, self.grid.file_bytes
        if not file.is_file():
            raise CheckpointError(f"{file}: is not there; it holds tensor {self.name}")
        found = size(file)
        data = np.empty(expected if found == expected else 0, np.uint8)
        if found != expected or read_into(file, 0, data.data) != expected:
            raise CheckpointError(f"{file}: has {found} bytes, expected {expected}; it holds tensor {self.name}")
        if not np.array_equal(data[self.grid.chunk_bytes :], self.grid.footer):
            raise CheckpointError(f"{file}: its index of parts is damaged; it holds tensor {self.name}")
        array = self.grid.decode(data)
        if check and digest(array) != self.sha256:
            raise CheckpointError(f"{file}: tensor {self.name} is not what was converted: its checksum differs")
        return array[0] if self.stacked else array

    def check(self) -> None:
        """Raises CheckpointError, as `read` does, for a file that is not what was converted."""
        self.read(check=True)
