//! What a capture is written to: a file, which grows by whole records, or a pipe, whose readers come and go.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cleave_common::exit::{ExitCode, Failure};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tracing::{debug, info};

use super::{FILE_HEADER, RECORD_HEADER, file_header};

/// Why there is no capture, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PcapError {
    #[error("--pcap {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "--pcap {}: this is a file, and no capture with this snaplen to go on with: name another one, or remove it",
        .0.display()
    )]
    OtherFile(PathBuf),
    #[error("--pcap {}: it takes a file, or a pipe made with mkfifo", .0.display())]
    Kind(PathBuf),
    #[error("the file cannot be written: {0}")]
    Write(#[source] io::Error),
    #[error("waiting failed: {0}")]
    Wait(#[source] io::Error),
}

impl From<PcapError> for Failure {
    fn from(error: PcapError) -> Self {
        Self::new(ExitCode::Usage, error)
    }
}

#[derive(Debug)]
pub(crate) enum Output {
    File {
        file: File,
        /// Bytes that are there, in whole records.
        len: u64,
    },
    Pipe(Box<Pipe>),
}

impl Output {
    /// Opens `path`: a file is made, or, if it is a capture, gone on with; a pipe is there already.
    pub(crate) fn open(path: &Path, snaplen: u32) -> Result<Self, PcapError> {
        let failed = |source| PcapError::Open { path: path.to_owned(), source };
        match fs::metadata(path).map(|metadata| metadata.file_type()) {
            Ok(kind) if kind.is_fifo() => {
                return Ok(Self::Pipe(Box::new(Pipe::open(path, snaplen).map_err(failed)?)));
            }
            Ok(kind) if !kind.is_file() => return Err(PcapError::Kind(path.to_owned())),
            _ => {}
        }
        let file = options().create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
        let len = whole_records(&file, snaplen).map_err(failed)?;
        let len = len.ok_or_else(|| PcapError::OtherFile(path.to_owned()))?;
        let mut output = Self::File { file, len };
        if len == 0 {
            output.write(&mut file_header(snaplen).to_vec())?;
        } else {
            info!("going on with the capture in {}", path.display());
            output.cut().map_err(failed)?;
        }
        Ok(output)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File { file, .. } => file.as_fd(),
            Self::Pipe(pipe) => pipe.file.as_fd(),
        }
    }

    /// Readable when readers of a pipe come or go.
    pub(super) fn readers_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::File { .. } => None,
            Self::Pipe(pipe) => Some(pipe.watch.as_fd()),
        }
    }

    /// Takes from `records` what it can write, or what nobody wants; says how many bytes were written.
    pub(super) fn write(&mut self, records: &mut Vec<u8>) -> Result<usize, PcapError> {
        match self {
            Self::Pipe(pipe) => pipe.write(records).map_err(PcapError::Write),
            Self::File { file, len } => {
                let written = file.write_all(records).map_err(PcapError::Write);
                if written.is_err() {
                    // What follows the last whole record would make the file end in the middle of one.
                    let _ = self.cut();
                    return written.map(|()| 0);
                }
                *len += records.len() as u64;
                let count = records.len();
                records.clear();
                Ok(count)
            }
        }
    }

    /// Has the file end behind its last whole record.
    fn cut(&mut self) -> io::Result<()> {
        if let Self::File { file, len } = self {
            file.set_len(*len)?;
            file.seek(SeekFrom::Start(*len))?;
        }
        Ok(())
    }
}

/// Without waiting: a pipe that nobody reads would keep us. Both ways: else that would be an error.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// Bytes up to the end of the last whole record; 0 of an empty file. `None`: it is no capture with this snaplen.
fn whole_records(file: &File, snaplen: u32) -> io::Result<Option<u64>> {
    let end = file.metadata()?.len();
    if end == 0 {
        return Ok(Some(0));
    }
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut header = [0; FILE_HEADER];
    match reader.read_exact(&mut header) {
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(error),
        read if read.is_err() || header != file_header(snaplen) => return Ok(None),
        _ => {}
    }
    let mut at = FILE_HEADER as u64;
    loop {
        let mut record = [0; RECORD_HEADER];
        if reader.read_exact(&mut record).is_err() {
            return Ok(Some(at));
        }
        let kept = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]);
        let next = at + RECORD_HEADER as u64 + u64::from(kept);
        if kept > snaplen || next > end {
            return Ok(Some(at));
        }
        reader.seek_relative(kept.into())?;
        at = next;
    }
}

/// A named pipe. Both of its ends are open here, so that what a reader has left can be taken out again; who else opens and
/// closes it is known by watching the file, which tells of several at once as of one: it has one reader at a time.
#[derive(Debug)]
pub(crate) struct Pipe {
    file: File,
    watch: OwnedFd,
    header: [u8; FILE_HEADER],
    is_read: bool,
    /// The reader has not got the header yet.
    is_new: bool,
}

impl Pipe {
    fn open(path: &Path, snaplen: u32) -> io::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, path, WatchFlags::OPEN | WatchFlags::CLOSE)?;
        // It can be opened to write only, without waiting, when somebody has opened it to read, or waits to.
        let is_read = options().read(false).open(path).is_ok();
        let file = options().open(path)?;
        let mut pipe = Self { file, watch, header: file_header(snaplen), is_read, is_new: is_read };
        // That was this program.
        pipe.events()?;
        (pipe.is_read, pipe.is_new) = (is_read, is_read);
        pipe.empty();
        Ok(pipe)
    }

    fn write(&mut self, records: &mut Vec<u8>) -> io::Result<usize> {
        self.look(records)?;
        if !self.is_read {
            records.clear();
        }
        let mut written = 0;
        while written < records.len() {
            match rustix::io::write(&self.file, &records[written..]) {
                Ok(count) => written += count,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        records.drain(..written);
        Ok(written)
    }

    /// Sees who has come and gone since the last look. A reader gets the header first, and nothing that was meant for
    /// another one.
    fn look(&mut self, records: &mut Vec<u8>) -> io::Result<()> {
        let before = self.is_read;
        let come = self.events()?;
        if come || before && !self.is_read {
            self.empty();
            records.clear();
            debug!("the capture's pipe has {} reader", if self.is_read { "a" } else { "no" });
        }
        if self.is_read && std::mem::take(&mut self.is_new) {
            records.splice(0..0, self.header);
        }
        Ok(())
    }

    /// Takes what the file's watch tells. `true`: somebody has opened it.
    fn events(&mut self) -> io::Result<bool> {
        let mut come = false;
        let mut room = [MaybeUninit::uninit(); 1024];
        let mut events = Reader::new(&self.watch, &mut room);
        loop {
            let event = match events.next() {
                Ok(event) => event.events(),
                Err(Errno::AGAIN) => return Ok(come),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if event.contains(ReadFlags::OPEN) {
                come = true;
                (self.is_read, self.is_new) = (true, true);
            } else if event.intersects(ReadFlags::CLOSE_WRITE | ReadFlags::CLOSE_NOWRITE) {
                self.is_read = false;
            }
        }
    }

    /// Takes out what nobody has read.
    fn empty(&mut self) {
        let mut bytes = [0; 4096];
        while rustix::io::read(&self.file, &mut bytes).is_ok_and(|count| count != 0) {}
    }
}
