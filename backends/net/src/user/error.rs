//! Why there is no user network, and what to do about it.

use std::io;
use std::path::PathBuf;

use cleave_common::exit::Failure;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error(
        "{} is not there: install the package passt (Debian: apt install passt), or name the program with --passt PATH", .0.display()
    )]
    NoProgram(PathBuf),
    #[error("{} cannot be started", program.display())]
    Start { program: PathBuf, source: io::Error },
    /// `said` has its words, if any.
    #[error("passt does not serve: it {how}{said}")]
    Ended { how: String, said: String },
    #[error("the process that starts passt cannot be started")]
    Keeper(#[source] io::Error),
    #[error("the process that starts passt has ended")]
    KeeperGone,
    #[error("cannot prepare to talk to passt")]
    Prepare(#[from] io::Error),
}

impl From<UserError> for Failure {
    fn from(error: UserError) -> Self {
        Self::host(error)
    }
}
