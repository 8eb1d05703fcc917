//! What a successor has to know: what was asked for by the control socket, and how large the guest's memory is.
//!
//! It is kept in a file that outlives this process: the VMM's, which gives each daemon the same one, or `--state`. A
//! successor without it would begin with what the command line says, and the guest would see its balloon change because a
//! process died. What is read back is checked like any other input.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

/// Bytes of a record: it is written at once, into one page of the file.
const RECORD: usize = 512;

const VERSION: u32 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Kept {
    /// Bytes that the guest is to have; `None` is all.
    pub(crate) target: Option<u64>,
    /// Bytes of guest memory; 0 before a guest was there.
    pub(crate) memory: u64,
    /// Between two questions for statistics; 0 is none.
    pub(crate) interval_ms: u64,
    pub(crate) inhibited: bool,
    /// The automatic mode runs.
    pub(crate) auto: bool,
}

impl Kept {
    pub(crate) fn interval(&self) -> Option<Duration> {
        (self.interval_ms != 0).then(|| Duration::from_millis(self.interval_ms))
    }
}

/// A record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<S> {
    version: u32,
    state: S,
}

/// The file, if there is one.
#[derive(Debug)]
pub(crate) struct Keeper(Option<File>);

impl Keeper {
    pub(crate) fn new(file: Option<File>) -> Self {
        Self(file)
    }

    /// What a predecessor left; `None` if there was none, or it left nothing that makes sense.
    pub(crate) fn load(&self) -> Option<Kept> {
        let mut bytes = [0; RECORD];
        let read = self.0.as_ref()?.read_at(&mut bytes, 0);
        let read = read.inspect_err(|error| warn!("the state cannot be read: {error}")).ok()?;
        let text = bytes[..read].trim_ascii();
        if text.is_empty() {
            return None;
        }
        let senseless =
            |error: &serde_json::Error| warn!("the state makes no sense, and is not used: {error}");
        let envelope: Envelope<Value> = serde_json::from_slice(text).inspect_err(senseless).ok()?;
        if envelope.version != VERSION {
            warn!("the state is of version {}, and {VERSION} is known: it is not used", envelope.version);
            return None;
        }
        serde_json::from_value(envelope.state).inspect_err(senseless).ok()
    }

    pub(crate) fn save(&self, kept: &Kept) {
        let Some(file) = &self.0 else { return };
        let record = Envelope { version: VERSION, state: kept };
        let saved = serde_json::to_vec(&record).map_err(io::Error::other).and_then(|mut bytes| {
            bytes.resize(RECORD, b' ');
            file.write_all_at(&bytes, 0)
        });
        if let Err(error) = saved {
            warn!("the state is not kept: if this process dies, its successor begins anew: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_nonsense_does_not() {
        let file = tempfile::tempfile().unwrap();
        let keeper = Keeper::new(Some(file.try_clone().unwrap()));
        assert_eq!(keeper.load(), None);
        let kept =
            Kept { target: Some(5 << 30), memory: 8 << 30, interval_ms: 1500, inhibited: true, auto: true };
        keeper.save(&kept);
        assert_eq!(keeper.load(), Some(kept.clone()));
        assert_eq!(kept.interval(), Some(Duration::from_millis(1500)));
        keeper.save(&Kept::default());
        assert_eq!(keeper.load().unwrap().target, None);
        for nonsense in ["{", "{\"version\": 2, \"state\": {}}", "[1]"] {
            file.set_len(0).unwrap();
            file.write_all_at(nonsense.as_bytes(), 0).unwrap();
            assert_eq!(keeper.load(), None, "{nonsense}");
        }
        assert_eq!(Keeper::new(None).load(), None);
    }
}
