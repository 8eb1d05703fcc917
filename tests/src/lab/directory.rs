//! One directory a run, under `runs/` in the cache: the share with the job, and the consoles. Kept when the
//! run failed, up to a number of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cache::Cache;
use crate::error::{Context, Result};

const KEPT_RUNS: usize = 20;

#[derive(Debug)]
pub struct RunDirectory {
    directory: tempfile::TempDir,
}

impl RunDirectory {
    pub(super) fn create(cache: &Cache) -> Result<Self> {
        let runs = cache.root().join("runs");
        fs::create_dir_all(&runs).context(|| format!("create {}", runs.display()))?;
        forget_old(&runs);
        let directory = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&runs)
            .context(|| format!("create a directory in {}", runs.display()))?;
        let made = Self { directory };
        fs::create_dir(made.share()).context(|| format!("create {}", made.share().display()))?;
        Ok(made)
    }

    /// The directory that the job sees as `$LAB` and can write.
    pub fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// How long the lab's machine has given no sign of life; `None` before the first.
    pub(super) fn silence(&self) -> Option<Duration> {
        let seen = fs::metadata(self.share().join("alive")).ok()?.modified().ok()?;
        // A clock that was set back makes it young.
        Some(seen.elapsed().unwrap_or_default())
    }

    /// What the lab's machine said on its console.
    pub fn console(&self) -> PathBuf {
        self.directory.path().join("console")
    }

    /// What the emulator itself had to say.
    pub fn machine_log(&self) -> PathBuf {
        self.directory.path().join("qemu.log")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Keeps the directory for a person to look at.
    pub fn keep(&mut self) {
        self.directory.disable_cleanup(true);
    }
}

/// Removes all but the newest kept runs. What another process removes meanwhile is none of our business.
fn forget_old(runs: &Path) {
    let mut found: Vec<(std::time::SystemTime, PathBuf)> = fs::read_dir(runs)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort();
    for (_, path) in found.iter().rev().skip(KEPT_RUNS) {
        let _ = fs::remove_dir_all(path);
    }
}
