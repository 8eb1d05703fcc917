use std::fs;
use std::io::{Read, Write};

use super::*;

/// A shell that plays the daemon: descriptor 3 is its socket.
fn shell(script: &str) -> (Daemon, UnixStream) {
    let spec = DaemonSpec {
        program: "sh".into(),
        device: "disk0".into(),
        // `sh --fd=3` is not an option of a shell, so the script's own name comes before it.
        args: vec!["-c".into(), script.into()],
    };
    spawn_as(&spec, |command| drop(command)).unwrap()
}
