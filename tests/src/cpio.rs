//! The archive format of an initramfs: "newc" cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Archives can be joined end to end; the kernel unpacks them in order, later files replacing earlier ones.

use std::fs;
use std::path::Path;

use crate::error::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// An archive in memory. Everything in it belongs to root and is executable.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    pub fn directory(&mut self, path: &str) {
        self.member(path, DIRECTORY, &[]);
    }

    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.member(path, EXECUTABLE, content);
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.member(path, SYMLINK, target.as_bytes());
    }

    /// A file of this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).context(|| format!("read {}", from.display()))?;
        self.file(path, &content);
        Ok(())
    }

    /// The archive with its trailer, padded to 512 bytes so that another can follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn member(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inodes += 1;
        let links = 1;
        let (uid, gid, mtime, check) = (0, 0, 0, 0);
        let (major, minor, rmajor, rminor) = (0, 0, 0, 0);
        let (size, name_size) = (content.len(), path.len() + 1);
        self.bytes.extend_from_slice(b"070701");
        let fields = [self.inodes, mode, uid, gid, links, mtime, size as u32, major, minor, rmajor, rminor];
        for field in fields.into_iter().chain([name_size as u32, check]) {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_aligned_and_the_archive_ends_with_a_trailer() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/a", b"12345");
        archive.symlink("bin/b", "a");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        // Header 110 + "bin\0" = 114, padded to 116: the second member begins there.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[116..122], b"070701");
        // Its size field is the seventh of eight hexadecimal digits each.
        assert_eq!(&bytes[116 + 6 + 6 * 8..][..8], b"00000005");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
