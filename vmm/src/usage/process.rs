//! A process, from /proc. One that ends while it is looked at is not there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::smaps::{self, FileId, Mapping};

/// What can be known of every process, whosever it is.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub pid: u32,
    pub parent: u32,
    /// What it calls itself; nothing in it is to be trusted.
    pub name: String,
}

impl Process {
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        parse_stat(pid, &String::from_utf8_lossy(&stat))
    }

    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut all: Vec<_> = pids.filter_map(Self::of).collect();
        all.sort_by_key(|process| process.pid);
        all
    }

    /// Whether its command line is `... run ...`.
    pub fn runs(&self) -> bool {
        let words = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(b"run")
    }

    /// Its mappings, without figures: quick.
    pub fn maps(&self) -> io::Result<Vec<Mapping>> {
        self.mappings("maps")
    }

    /// Its mappings with the kernel's figures.
    pub fn smaps(&self) -> io::Result<Vec<Mapping>> {
        self.mappings("smaps")
    }

    fn mappings(&self, file: &str) -> io::Result<Vec<Mapping>> {
        let text = fs::read(format!("/proc/{}/{file}", self.pid))?;
        Ok(smaps::parse(&String::from_utf8_lossy(&text)))
    }

    /// Size and allocated bytes of a file that it has open.
    pub fn open_file(&self, wanted: FileId) -> io::Result<Option<(u64, u64)>> {
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            // The link leads to the open file itself, whether it still has a name or not.
            let Ok(metadata) = fs::metadata(entry?.path()) else { continue };
            let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
            if (FileId { device, inode: metadata.ino() }) == wanted {
                return Ok(Some((metadata.size(), metadata.blocks() * 512)));
            }
        }
        Ok(None)
    }
}

/// `123 (name) S 1 ...`; the name may hold anything, brackets too.
fn parse_stat(pid: u32, stat: &str) -> Option<Process> {
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let mut fields = rest.split_whitespace();
    let alive = fields.next().is_some_and(|state| !matches!(state, "Z" | "X"));
    let parent = fields.next()?.parse().ok()?;
    alive.then(|| Process { pid, parent, name: name.escape_default().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_anything() {
        let process = parse_stat(7, "7 (a) (b\n) S 5 7 7 0").unwrap();
        assert_eq!((process.parent, process.name.as_str()), (5, "a) (b\\n"));
        assert!(parse_stat(7, "7 (gone) Z 5 7 7 0").is_none());
        for text in ["", "7", "7 (x", "7 (x) S", "7 (x) S y"] {
            assert!(parse_stat(7, text).is_none(), "{text}");
        }
    }

    #[test]
    fn this_process_is_one() {
        let this = Process::of(std::process::id()).unwrap();
        assert!(
            Process::all().iter().any(|process| process.pid == this.pid && process.parent == this.parent)
        );
        assert!(this.maps().unwrap().len() > 5);
        assert!(Process::of(u32::MAX).is_none());
    }
}
