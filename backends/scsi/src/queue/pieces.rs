//! Work that the engine has no word for: comparing, verifying, writing one block all over. It goes through memory of our
//! own, piece by piece.
//!
//! ```text
//!   first --> a transfer --done--> moved --> the next transfer ... --> over
//! ```

use cleave_runtime::{GuestMemory, Segment};
use cleave_scsi::{Failure, Io, Range};
use cleave_storage::{Direction, Transfer};

use crate::request::{data, read_all};

/// Most bytes that are moved at once.
const PIECE: u64 = 128 << 10;

#[derive(Debug)]
pub(super) struct Pieces {
    kind: Kind,
    range: Range,
    done: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
enum Kind {
    /// The buffer is full of the pattern.
    WriteSame {
        durable: bool,
    },
    Verify,
    /// With what the guest has at these places.
    Compare(Vec<Segment>),
    /// With each block of the buffer's size.
    CompareSame(Box<[u8]>),
    /// The whole range at once: what is to be there, and what is to replace it, until that is under way.
    CompareAndWrite {
        expected: Vec<u8>,
        new: Option<Vec<u8>>,
        durable: bool,
    },
}

/// What to do next.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Move the first so many bytes of [`Pieces::buffer`].
    Move(Transfer, usize),
    Over(Result<(), Failure>),
}

impl Pieces {
    /// `None`: the engine does it alone. `data_out`: the guest's first bytes, as many as are asked for.
    pub(super) fn new(
        io: Io,
        data_out: impl Fn(u64) -> Vec<Segment>,
        memory: &GuestMemory,
    ) -> Option<Result<Self, Failure>> {
        let (kind, range, buffer) = match io {
            Io::WriteSame { range, pattern, durable } => {
                let times = (PIECE.min(range.len) as usize / pattern.len().max(1)).max(1);
                (Kind::WriteSame { durable }, range, pattern.repeat(times))
            }
            Io::Verify { range } => (Kind::Verify, range, room(range)),
            Io::Compare { range } => (Kind::Compare(data_out(range.len)), range, room(range)),
            Io::CompareSame { range, pattern } => (Kind::CompareSame(pattern), range, room(range)),
            Io::CompareAndWrite { range, durable } => {
                let len = range.len as usize;
                let mut expected = vec![0; 2 * len];
                if read_all(data_out(2 * range.len).into_iter(), memory, &mut expected).is_err() {
                    return Some(Err(Failure::Internal));
                }
                let new = Some(expected.split_off(len));
                (Kind::CompareAndWrite { expected, new, durable }, range, vec![0; len])
            }
            Io::Read { .. } | Io::Write { .. } | Io::Flush | Io::Unmap { .. } | Io::WriteZeroes { .. } => {
                return None;
            }
        };
        Some(Ok(Self { kind, range, done: 0, buffer }))
    }

    /// What the rate limits are to count.
    pub(super) fn cost(&self) -> (Direction, u64) {
        match self.kind {
            Kind::WriteSame { .. } | Kind::CompareAndWrite { .. } => (Direction::Write, self.range.len),
            Kind::Verify | Kind::Compare(_) | Kind::CompareSame(_) => (Direction::Read, self.range.len),
        }
    }

    /// Bytes of memory that it holds.
    pub(super) fn held(&self) -> usize {
        match &self.kind {
            Kind::CompareAndWrite { .. } => 3 * self.buffer.len(),
            _ => self.buffer.len(),
        }
    }

    pub(super) fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn piece(&self) -> usize {
        (self.range.len - self.done).min(self.buffer.len() as u64) as usize
    }

    /// What to do first, and again after each piece that matters no more.
    pub(super) fn next(&mut self) -> Next {
        let len = self.piece();
        if len == 0 {
            return Next::Over(Ok(()));
        }
        let offset = self.range.offset + self.done;
        let transfer = match self.kind {
            Kind::WriteSame { durable } | Kind::CompareAndWrite { new: None, durable, .. } => {
                Transfer::write(offset, durable)
            }
            _ => Transfer::read(offset),
        };
        Next::Move(transfer, len)
    }

    /// A piece is where it belongs.
    pub(super) fn moved(&mut self, memory: &GuestMemory) -> Next {
        let len = self.piece();
        let piece = &self.buffer[..len];
        let differs = match &mut self.kind {
            Kind::WriteSame { .. } | Kind::Verify | Kind::CompareAndWrite { new: None, .. } => None,
            Kind::Compare(segments) => {
                let mut theirs = vec![0; len];
                if read_all(data(segments, self.done, len as u64), memory, &mut theirs).is_err() {
                    return Next::Over(Err(Failure::Internal));
                }
                difference(piece, &theirs).map(|at| self.done + at)
            }
            Kind::CompareSame(pattern) => {
                let block = pattern.len().max(1);
                piece.chunks(block).find_map(|here| difference(here, pattern))
            }
            Kind::CompareAndWrite { expected, new, .. } => match (difference(piece, expected), new.take()) {
                (None, Some(new)) => {
                    self.buffer = new;
                    return self.next();
                }
                (at, _) => at,
            },
        };
        if let Some(at) = differs {
            return Next::Over(Err(Failure::Miscompare { at }));
        }
        self.done += len as u64;
        self.next()
    }
}

fn room(range: Range) -> Vec<u8> {
    // Pieces are whole blocks: ranges are, and no block is longer than 4096 bytes.
    vec![0; PIECE.min(range.len) as usize]
}

/// The first byte that differs.
fn difference(one: &[u8], other: &[u8]) -> Option<u64> {
    if one == other {
        return None;
    }
    one.iter().zip(other).position(|(one, other)| one != other).map(|at| at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range { offset: 4096, len: 300 << 10 };

    fn pieces(io: Io) -> Pieces {
        let memory = GuestMemory::default();
        Pieces::new(io, |_| Vec::new(), &memory).unwrap().unwrap()
    }

    #[test]
    fn a_block_is_written_all_over() {
        let mut pieces = pieces(Io::WriteSame { range: RANGE, pattern: vec![7; 512].into(), durable: true });
        let memory = GuestMemory::default();
        let (mut next, mut sum) = (pieces.next(), 0);
        while let Next::Move(transfer, len) = next {
            assert_eq!(transfer, Transfer::write(RANGE.offset + sum, true));
            assert!(pieces.buffer()[..len].iter().all(|byte| *byte == 7));
            sum += len as u64;
            next = pieces.moved(&memory);
        }
        assert_eq!((next, sum), (Next::Over(Ok(())), RANGE.len));
    }

    #[test]
    fn the_first_byte_that_differs_is_told() {
        let mut pieces = pieces(Io::CompareSame { range: RANGE, pattern: vec![0; 512].into() });
        let memory = GuestMemory::default();
        assert!(matches!(pieces.next(), Next::Move(..)));
        assert!(matches!(pieces.moved(&memory), Next::Move(..)));
        pieces.buffer()[1029] = 1;
        assert_eq!(pieces.moved(&memory), Next::Over(Err(Failure::Miscompare { at: 5 })));
    }
}
