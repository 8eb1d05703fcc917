//! Output of a job that goes to this process's own as it comes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Copies what the job wrote since the last look. Lines stay whole: several jobs may be followed at once.
pub(super) struct Follower {
    streams: Vec<Stream>,
}

struct Stream {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of a line whose end has not come.
    rest: Vec<u8>,
    to: Box<dyn Write>,
}

impl Follower {
    /// Of the output in `share`; of nothing unless it is `wanted`.
    pub(super) fn new(share: &Path, wanted: bool) -> Self {
        let stream = |name: &str, to: Box<dyn Write>| Stream {
            path: share.join(name),
            file: None,
            rest: Vec::new(),
            to,
        };
        let streams = if wanted {
            vec![stream("stdout", Box::new(io::stdout())), stream("stderr", Box::new(io::stderr()))]
        } else {
            Vec::new()
        };
        Self { streams }
    }

    pub(super) fn copy(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.copy(false));
    }

    /// The job is over: a last line without an end goes out too.
    pub(super) fn finish(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.copy(true));
    }
}

impl Stream {
    fn copy(&mut self, all: bool) {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        // A file that cannot be read now is read at the next look, and whole in the outcome.
        let Some(Ok(_)) = self.file.as_mut().map(|file| file.read_to_end(&mut self.rest)) else { return };
        let end = match self.rest.iter().rposition(|byte| *byte == b'\n') {
            _ if all => self.rest.len(),
            Some(last) => last + 1,
            None => 0,
        };
        if end != 0 {
            // One write, which no other job's lines come between.
            let _ = self.to.write_all(&self.rest[..end]).and_then(|()| self.to.flush());
            self.rest.drain(..end);
        }
    }
}
