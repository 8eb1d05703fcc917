//! passt's stream protocol, which is that of QEMU's `-netdev stream`: each frame behind its length, 32 bits, the most
//! significant byte first. Without a virtio-net header.
//!
//! Invariants: a frame is read, or written, whole or not at all, however the stream is cut: what has come of one stays in
//! [`Incoming`], what is still to go of one in [`Outgoing`], until the socket is another one. Nothing here grows.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use cleave_common::mac::MacAddress;

use crate::buffers::GuestBuffers;

/// Bytes before each frame.
const LENGTH: usize = 4;

/// Bytes of the largest frame that passt takes or gives, with its Ethernet header.
pub(super) const MAX_FRAME: usize = 65535;

/// Room for the largest frame, and for what comes behind it.
const ROOM: usize = 128 << 10;

/// EtherType for experiments (IEEE 802).
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

/// A frame that nobody makes anything of, as it is written.
pub(super) fn nothing(from: MacAddress) -> Vec<u8> {
    let mut frame = [[0xff; 6], from.bytes()].concat();
    frame.extend(EXPERIMENTAL);
    frame.resize(60, 0);
    [&length(frame.len())[..], &frame].concat()
}

fn length(len: usize) -> [u8; LENGTH] {
    (len as u32).to_be_bytes()
}

/// Why there are no more frames.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error("it closed its socket")]
    Closed,
    #[error("it announced a frame of {0} bytes, and {MAX_FRAME} are possible")]
    TooLong(u32),
    #[error("its socket fails")]
    Io(#[source] io::Error),
}

/// Frames out of a stream.
#[derive(Debug)]
pub(super) struct Incoming {
    room: Box<[u8]>,
    /// What has been read, and not been taken.
    filled: Range<usize>,
}

impl Default for Incoming {
    fn default() -> Self {
        Self { room: vec![0; ROOM].into_boxed_slice(), filled: 0..0 }
    }
}

impl Incoming {
    /// For another stream.
    pub(super) fn forget(&mut self) {
        self.filled = 0..0;
    }

    /// The next frame. `None`: it is not there, or not all of it, and `read` has said that it would have to wait.
    pub(super) fn next(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Option<&[u8]>, StreamError> {
        let frame = loop {
            if let Some(frame) = self.take()? {
                break frame;
            }
            // A frame that is not whole is moved to where there is room for the largest.
            if self.room.len() - self.filled.start < LENGTH + MAX_FRAME {
                self.room.copy_within(self.filled.clone(), 0);
                self.filled = 0..self.filled.len();
            }
            match read(&mut self.room[self.filled.end..]) {
                Ok(0) => return Err(StreamError::Closed),
                Ok(count) => self.filled.end += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(StreamError::Closed),
                Err(error) => return Err(StreamError::Io(error)),
            }
        };
        Ok(Some(&self.room[frame]))
    }

    /// A frame that is whole.
    fn take(&mut self) -> Result<Option<Range<usize>>, StreamError> {
        let filled = &self.room[self.filled.clone()];
        let Some((length, rest)) = filled.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length);
        if length as usize > MAX_FRAME {
            return Err(StreamError::TooLong(length));
        }
        if rest.len() < length as usize {
            return Ok(None);
        }
        let start = self.filled.start + LENGTH;
        let frame = start..start + length as usize;
        self.filled.start = frame.end;
        if self.filled.is_empty() {
            self.filled = 0..0;
        }
        Ok(Some(frame))
    }
}

/// Frames into a stream.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// The end of a frame of which the beginning is written.
    rest: Vec<u8>,
    /// Bytes of `rest` that are written, too.
    written: usize,
}

impl Outgoing {
    /// For another stream.
    pub(super) fn forget(&mut self) {
        self.rest.clear();
        self.written = 0;
    }

    /// Writes the rest of the last frame.
    ///
    /// # Errors
    /// `WouldBlock`: not all of it.
    pub(super) fn flush(&mut self, socket: &OwnedFd) -> io::Result<()> {
        while self.written < self.rest.len() {
            match rustix::io::write(socket, &self.rest[self.written..]).map_err(io::Error::from) {
                Ok(0) => return Err(ErrorKind::WouldBlock.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.forget();
        Ok(())
    }

    /// Writes the frame that is in `buffers` behind `header` bytes. What the socket has no room for is kept.
    ///
    /// # Errors
    /// `WouldBlock`: there is no room even for its beginning.
    pub(super) fn send(&mut self, socket: &OwnedFd, buffers: &GuestBuffers, header: usize) -> io::Result<()> {
        self.flush(socket)?;
        let len = buffers.len().saturating_sub(header);
        if len > MAX_FRAME {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        let before = length(len);
        let written = loop {
            match buffers.writev_behind(socket.as_fd(), &before, header) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) => return Err(ErrorKind::WouldBlock.into()),
                written => break written?,
            }
        };
        if written < LENGTH + len {
            self.keep(&before, buffers, header, len, written);
        }
        Ok(())
    }

    /// Keeps what is behind the first `written` bytes of a frame of `len`.
    fn keep(&mut self, before: &[u8], buffers: &GuestBuffers, header: usize, len: usize, written: usize) {
        self.rest.extend(&before[written.min(LENGTH)..]);
        let start = self.rest.len();
        let from = written.saturating_sub(LENGTH);
        self.rest.resize(start + len - from, 0);
        buffers.read_at(header + from, &mut self.rest[start..]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Hands out `stream` in pieces of these lengths; 0 is one that would have to wait.
    fn in_pieces(stream: &[u8], pieces: Vec<usize>) -> impl FnMut(&mut [u8]) -> io::Result<usize> {
        let (mut left, mut pieces) = (VecDeque::from(stream.to_vec()), pieces.into_iter());
        move |room| {
            assert!(!room.is_empty(), "there is always room");
            match pieces.next() {
                Some(0) => Err(ErrorKind::WouldBlock.into()),
                piece => {
                    let count = piece.unwrap_or(usize::MAX).min(left.len()).min(room.len());
                    left.drain(..count).zip(room).for_each(|(byte, place)| *place = byte);
                    Ok(count)
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_are_whole_however_the_stream_is_cut(
            lens in prop::collection::vec(prop_oneof![0..100_usize, 60_000..=MAX_FRAME], 0..6),
            pieces in prop::collection::vec(prop_oneof![0..9_usize, 1000..70_000_usize], 0..300),
        ) {
            let frames: Vec<Vec<u8>> = lens.iter().enumerate().map(|(at, len)| vec![at as u8; *len]).collect();
            let stream: Vec<u8> =
                frames.iter().flat_map(|frame| [&length(frame.len())[..], frame].concat()).collect();
            let mut read = in_pieces(&stream, pieces);
            let (mut incoming, mut found) = (Incoming::default(), Vec::new());
            loop {
                match incoming.next(&mut read) {
                    Ok(Some(frame)) => found.push(frame.to_vec()),
                    Ok(None) => {}
                    Err(StreamError::Closed) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            prop_assert!(found == frames);
        }

        #[test]
        fn no_bytes_make_it_panic(stream in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut read = in_pieces(&stream, Vec::new());
            let mut incoming = Incoming::default();
            while let Ok(Some(frame)) = incoming.next(&mut read) {
                prop_assert!(frame.len() <= 400);
            }
        }
    }

    #[test]
    fn a_length_that_cannot_be_ends_the_stream_before_anything_is_waited_for() {
        let mut incoming = Incoming::default();
        let stream = [0, 1, 0, 0];
        assert!(matches!(incoming.next(in_pieces(&stream, Vec::new())), Err(StreamError::TooLong(65536))));
        incoming.forget();
        assert_eq!(incoming.next(in_pieces(&[0, 0, 0, 1, 7], Vec::new())).unwrap(), Some(&[7][..]));
    }
}
