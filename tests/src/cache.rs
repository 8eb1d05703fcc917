//! Things that are slow to make and made once: directories under `target/lab`.
//!
//! ```text
//! absent ──lock──> staging directory ──rename──> entry, with the key it was made for ──other key──> absent
//! ```
//!
//! Invariants:
//! 1. An entry appears whole or not at all: it is built beside its place and renamed there last.
//! 2. An entry is built by one process at a time; the others wait and take what that one built.
//! 3. An entry is used only for the key it was built for, so a changed recipe builds again.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::error::{Context, Result};

const KEY_FILE: &str = ".key";

/// The directory that holds the lab's artefacts.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$CLEAVE_LAB_DIR`, or `lab` in cargo's target directory.
    pub fn open() -> Result<Self> {
        let root =
            std::env::var_os("CLEAVE_LAB_DIR").map_or_else(|| target_directory().join("lab"), PathBuf::from);
        Self::at(root)
    }

    pub fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).context(|| format!("create {}", root.display()))?;
        let root = root.canonicalize().context(|| format!("resolve {}", root.display()))?;
        Ok(Self { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory `name`, made by `build` unless it is there for this very `key`. `build` gets an empty
    /// directory to fill.
    pub fn entry(&self, name: &str, key: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let place = self.root.join(name);
        if holds(&place, key) {
            return Ok(place);
        }
        let _lock = self.lock(name)?;
        if holds(&place, key) {
            return Ok(place);
        }
        let staging = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .tempdir_in(&self.root)
            .context(|| format!("create a directory in {}", self.root.display()))?;
        let fresh = staging.path().join("new");
        fs::create_dir(&fresh).context(|| format!("create {}", fresh.display()))?;
        build(&fresh)?;
        fs::write(fresh.join(KEY_FILE), key).context(|| format!("write the key of {name}"))?;
        if place.exists() {
            // The old entry leaves with the staging directory.
            fs::rename(&place, staging.path().join("old"))
                .context(|| format!("replace {}", place.display()))?;
        }
        fs::rename(&fresh, &place).context(|| format!("move {} into place", place.display()))?;
        Ok(place)
    }

    /// Waits for the exclusive right to change `name`; it ends with the returned file.
    fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!(".{name}.lock"));
        let file = File::create(&path).context(|| format!("create {}", path.display()))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("lab: another process is making {name}: waiting for it");
            rustix::fs::flock(&file, FlockOperation::LockExclusive)
                .context(|| format!("lock {}", path.display()))?;
        }
        Ok(file)
    }
}

/// A key for what `parts` say: it changes when one of them does.
pub fn key(parts: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Cargo's target directory: binaries and the lab's artefacts are under it.
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from)
}

fn holds(place: &Path, key: &str) -> bool {
    fs::read_to_string(place.join(KEY_FILE)).is_ok_and(|found| found == key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn scratch() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path().to_owned()).unwrap();
        (directory, cache)
    }

    fn with(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |place| fs::write(place.join("file"), text).context(|| "write")
    }

    #[test]
    fn an_entry_is_built_once_a_key() {
        let (_directory, cache) = scratch();
        let place = cache.entry("thing", "1", with("first")).unwrap();
        cache.entry("thing", "1", |_| panic!("built twice")).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "first");
        cache.entry("thing", "2", with("second")).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "second");
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_the_old_entry_alone() {
        let (directory, cache) = scratch();
        let place = cache.entry("thing", "1", with("first")).unwrap();
        let failed = cache.entry("thing", "2", |place| {
            fs::write(place.join("file"), "half").unwrap();
            Err(Error::Refused("no".to_owned()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "first");
        let left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "the entry and its lock, but found {left:?}");
    }

    #[test]
    fn two_callers_at_once_build_once() {
        let (_directory, cache) = scratch();
        let built = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    cache
                        .entry("thing", "1", |_| {
                            built.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                            std::thread::sleep(std::time::Duration::from_millis(50));
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(built.into_inner(), 1);
    }
}
