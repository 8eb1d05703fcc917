//! DPDK's testpmd from Debian's packages: a vhost-user backend that polls and does nothing but copy, the ceiling of what
//! one can reach.

use std::path::{Path, PathBuf};

use crate::cache::{self, Cache};
use crate::debian::Apt;
use crate::error::{Context, Result};

/// testpmd and its drivers of virtual devices; what else it needs they depend on.
const PACKAGES: [&str; 3] = ["dpdk-dev", "librte-net-vhost23", "librte-mempool-ring23"];

/// Headers and static libraries that come with it.
const UNUSED: [&str; 2] = ["usr/include", "usr/share"];

const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Drivers that testpmd does not link to. It would look for them where the packages belong, and what it is told to load (`-d`)
/// may not lie below a directory that everybody may write to; so the loader does it.
const DRIVERS: [&str; 3] = ["librte_bus_vdev.so.23", "librte_mempool_ring.so.23", "librte_net_vhost.so.23"];

/// Where testpmd is.
#[derive(Debug, Clone)]
pub struct Dpdk {
    place: PathBuf,
}

impl Dpdk {
    pub fn open(cache: &Cache) -> Result<Self> {
        let place = cache.entry("dpdk", &cache::key(&[&PACKAGES.join(" "), "1"]), |place| {
            let apt = Apt::open(cache)?;
            eprintln!("lab: fetching DPDK's testpmd with its libraries (70 MB)");
            let root = place.join("root");
            apt.unpack_with_dependencies(&PACKAGES, &root)?;
            for directory in UNUSED {
                std::fs::remove_dir_all(root.join(directory)).context(|| format!("remove {directory}"))?;
            }
            remove_static_libraries(&root.join(LIBRARIES))
        })?;
        Ok(Self { place })
    }

    /// testpmd with no huge pages and no PCI devices. Words for its environment (`--vdev`, `-l`) come next, then `--` and
    /// those for itself.
    pub fn testpmd(&self) -> (PathBuf, Vec<String>) {
        let root = self.place.join("root");
        let libraries = root.join(LIBRARIES);
        let drivers = DRIVERS.map(|driver| libraries.join(driver).display().to_string()).join(" ");
        let own = root.join("lib/x86_64-linux-gnu");
        let path = format!("{}:{}", own.display(), libraries.display());
        let program = root.join("usr/bin/dpdk-testpmd").display().to_string();
        let mut words: Vec<String> =
            ["--inhibit-cache", "--library-path", &path, "--preload", &drivers].map(str::to_owned).into();
        words.extend(["--argv0", "dpdk-testpmd", &program].map(str::to_owned));
        words.extend(
            ["--no-huge", "--no-pci", "--no-telemetry", "--no-shconf", "-m", "512"].map(str::to_owned),
        );
        (root.join(LOADER), words)
    }
}

fn remove_static_libraries(directory: &Path) -> Result<()> {
    let entries = std::fs::read_dir(directory).context(|| format!("list {}", directory.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "a") {
            std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}
