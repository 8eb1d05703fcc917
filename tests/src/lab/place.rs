//! Where jobs run: on this machine when its KVM runs stock guests, else in L1.
//!
//! `/dev/kvm` alone says little: a KVM that interprets part of its guests opens and then fails stock kernels.
//! `cleave check` runs a probe guest and knows.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where jobs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Directly, with this machine's KVM.
    Host,
    /// In an emulated machine.
    L1,
}

/// Chooses, and says why. `CLEAVE_LAB=host` or `CLEAVE_LAB=l1` decides by hand.
pub(super) fn choose() -> (Place, String) {
    match std::env::var("CLEAVE_LAB").as_deref() {
        Ok("host") => return (Place::Host, "CLEAVE_LAB says host".to_owned()),
        Ok("l1") => return (Place::L1, "CLEAVE_LAB says l1".to_owned()),
        _ => {}
    }
    let Some(cleave) = binaries().map(|directory| directory.join("cleave")) else {
        return (Place::L1, "cleave is not built yet, so this machine's KVM is not judged".to_owned());
    };
    match runs_stock_guest(&cleave) {
        Some(true) => (Place::Host, "cleave check: this machine's KVM runs stock guests".to_owned()),
        Some(false) => (Place::L1, "cleave check: this machine's KVM runs no stock guests".to_owned()),
        None => (Place::L1, "cleave check gave no verdict on this machine's KVM".to_owned()),
    }
}

/// The directory with `cleave` and its daemons: `$CLEAVE_BIN_DIR`, or the one this program was built into.
pub fn binaries() -> Option<PathBuf> {
    if let Some(directory) = std::env::var_os("CLEAVE_BIN_DIR") {
        return Some(PathBuf::from(directory));
    }
    let here = std::env::current_exe().ok()?;
    here.ancestors().skip(1).take(2).find(|directory| directory.join("cleave").exists()).map(Path::to_owned)
}

fn runs_stock_guest(cleave: &Path) -> Option<bool> {
    let output = Command::new("timeout")
        .args(["--kill-after=1", "30"])
        .arg(cleave)
        .args(["check", "--json"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    report.get("runs_stock_guest")?.as_bool()
}
