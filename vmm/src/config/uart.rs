//! `--uart`: where the first serial port's other end is.

use std::path::PathBuf;
use std::str::FromStr;

use cleave_common::options;
use serde::{Deserialize, Deserializer};

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub enum UartConfig {
    #[default]
    Stdio,
    /// A new pseudo-terminal, whose path is said on standard error.
    Pty,
    /// Output is appended to the file; there is no input.
    File(PathBuf),
    /// A listening socket that serves one client at a time.
    Unix(PathBuf),
    /// No uart at all: the guest finds none.
    Off,
}

impl FromStr for UartConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "off" => Ok(Self::Off),
            Some((word @ ("file" | "unix"), _)) => Err(format!("'{text}' needs a path: {word}=PATH")),
            None if matches!(text, "file" | "unix") => Err(format!("'{text}' needs a path: {text}=PATH")),
            _ => {
                let word = text.split('=').next().unwrap_or_default();
                let near = options::did_you_mean(word, ["stdio", "pty", "file", "unix", "off"]);
                Err(format!("'{text}' is not one of: stdio, pty, file=PATH, unix=PATH, off{near}"))
            }
        }
    }
}

impl<'de> Deserialize<'de> for UartConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        options::from_word(deserializer)
    }
}
