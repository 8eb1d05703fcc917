//! Transparent huge pages of shared memory: what the host gives, and whether that is what was asked for.

use std::fs;

use super::error::SHMEM_ENABLED;
use super::{MemoryError, Thp};

/// The same for pages of 2 MiB alone (Linux 6.11), where it does not say `inherit`.
const OF_2M: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled";

/// What the host says about shared memory in huge pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedHugePages {
    /// The chosen word of the setting; "none" for a kernel without it.
    pub setting: String,
}

impl SharedHugePages {
    pub(crate) fn of_host() -> Self {
        let chosen = |path| fs::read_to_string(path).ok().and_then(|text| chosen(&text));
        let own = chosen(OF_2M).filter(|word| word != "inherit");
        Self { setting: own.or_else(|| chosen(SHMEM_ENABLED)).unwrap_or_else(|| "none".to_owned()) }
    }

    /// Whether memory that asks for them has huge pages as it is touched.
    pub(crate) fn on_touch(&self) -> bool {
        matches!(self.setting.as_str(), "always" | "within_size" | "advise" | "force")
    }

    /// Whether they can be made of memory that is there (MADV_COLLAPSE).
    fn on_request(&self) -> bool {
        self.on_touch() || self.setting == "never"
    }

    /// Refuses what the host has not, and says what was wished for and will not be.
    pub(super) fn check(&self, thp: Option<Thp>, prefault: bool) -> Result<(), MemoryError> {
        let had = self.on_touch() || prefault && self.on_request();
        match thp {
            Some(Thp::Always) if !had => Err(MemoryError::NoHugePages(self.setting.clone())),
            Some(Thp::Advise) if !had => {
                tracing::warn!(
                    "thp=advise: this host gives shared memory no huge pages as it is touched ({SHMEM_ENABLED}: {}), so the guest gets small ones: echo advise > {SHMEM_ENABLED}",
                    self.setting
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    text.split(['[', ']']).nth(1).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn always_is_refused_where_there_are_none() {
        let check = |setting: &str, thp, prefault| {
            let host = SharedHugePages { setting: setting.to_owned() };
            host.check(Some(thp), prefault).map_err(|error| error.to_string())
        };
        for setting in ["always", "within_size", "advise", "force"] {
            assert_eq!(check(setting, Thp::Always, false), Ok(()), "{setting}");
        }
        assert_eq!(check("never", Thp::Always, true), Ok(()));
        for (setting, prefault, advice) in [
            (
                "never",
                false,
                "shmem_enabled: never); echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or add prefault=on",
            ),
            ("deny", true, "shmem_enabled: deny); echo advise > "),
            ("none", true, "CONFIG_TRANSPARENT_HUGEPAGE"),
        ] {
            let said = check(setting, Thp::Always, prefault).unwrap_err();
            assert!(said.contains(advice), "{said}");
            assert_eq!(check(setting, Thp::Advise, prefault), Ok(()));
            assert_eq!(check(setting, Thp::Never, prefault), Ok(()));
        }
    }

    #[test]
    fn the_setting_is_the_word_in_brackets() {
        assert_eq!(chosen("always within_size advise [never] deny force\n").as_deref(), Some("never"));
        assert_eq!(chosen("always inherit\n"), None);
    }
}
