//! Files, network and other processes, out of reach for this thread and those it starts. What is open stays usable.

use std::error::Error;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

/// The newest that was looked at; older kernels do what they know of it.
const KNOWN: ABI = ABI::V6;

/// Leaves nothing but the removal of files beside `socket_files`. `false`: this kernel has no Landlock.
pub(super) fn restrict(socket_files: &[&Path]) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    for file in socket_files {
        let directory = PathFd::new(directory_of(file))?;
        ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn directory_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
