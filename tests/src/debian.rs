//! Debian packages without touching the system's own: a private apt configuration whose sources are Debian 12
//! and its backports, whatever the machine runs. Needs no root; packages are downloaded and unpacked, never
//! installed.
//!
//! The machine's mirror and proxy settings are used; `CLEAVE_DEBIAN_MIRROR` names another mirror.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::cache::Cache;
use crate::error::{Context, Error, Result, run};

/// The release that guests and tools are made of.
pub const RELEASE: &str = "bookworm";
pub const BACKPORTS: &str = "bookworm-backports";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// A private apt: lists, cache and sources of its own, and the opinion that nothing is installed.
#[derive(Debug)]
pub struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Makes the configuration and fetches the package lists, unless recent ones are there.
    pub fn open(cache: &Cache) -> Result<Self> {
        Self::with(cache, sources()?)
    }

    /// The same of another release, without backports.
    pub fn of_release(cache: &Cache, release: &str) -> Result<Self> {
        let sources = sources()?;
        let line = sources.lines().next().unwrap_or_default();
        Self::with(cache, line.replace(RELEASE, release) + "\n")
    }

    fn with(cache: &Cache, sources: String) -> Result<Self> {
        let key = crate::cache::key(&[&sources, &half_days_since_1970().to_string(), "1"]);
        let directory = cache.entry("apt", &key, |place| {
            eprintln!("lab: fetching Debian's package lists");
            for child in ["state/lists/partial", "cache/archives/partial"] {
                fs::create_dir_all(place.join(child)).context(|| format!("create {child}"))?;
            }
            fs::write(place.join("sources.list"), &sources).context(|| "write sources.list")?;
            fs::write(place.join("status"), "").context(|| "write an empty status")?;
            let apt = Self { directory: place.to_owned() };
            run(apt.command("apt-get").args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]), "apt")?;
            Ok(())
        })?;
        Ok(Self { directory })
    }

    /// The newest package whose whole name matches the regular expression.
    pub fn newest(&self, pattern: &str) -> Result<String> {
        let found =
            run(self.command("apt-cache").args(["search", "--names-only", &format!("^{pattern}$")]), "apt")?;
        String::from_utf8_lossy(&found.stdout)
            .lines()
            .filter_map(|line| line.split(' ').next())
            .max_by(|a, b| natural_order(a, b))
            .map(str::to_owned)
            .ok_or_else(|| Error::NoPackage {
                pattern: pattern.to_owned(),
                sources: self.directory.join("sources.list"),
            })
    }

    /// Downloads `package` alone and unpacks it into `root`.
    pub fn unpack(&self, package: &str, root: &Path) -> Result<()> {
        let downloads = downloads()?;
        run(self.command("apt-get").args(["-qq", "download", package]).current_dir(downloads.path()), "apt")?;
        unpack_all(downloads.path(), root)
    }

    /// Downloads `packages` from the backports where they are there, with everything they depend on down to
    /// the C library, and unpacks all of it into `root`.
    pub fn unpack_with_dependencies(&self, packages: &[&str], root: &Path) -> Result<()> {
        let downloads = downloads()?;
        fs::create_dir(downloads.path().join("partial")).context(|| "create a download directory")?;
        let mut archives = OsString::from("Dir::Cache::archives=");
        archives.push(downloads.path());
        let mut command = self.command("apt-get");
        command.arg("-o").arg(archives);
        command.args(["-qq", "-y", "--no-install-recommends", "--download-only", "-t", BACKPORTS, "install"]);
        run(command.args(packages), "apt")?;
        unpack_all(downloads.path(), root)
    }

    /// The sources for mmdebstrap: the stable release with its updates.
    pub fn stable_sources(&self) -> Result<String> {
        Ok(sources()?.lines().filter(|line| !line.contains("backports")).collect::<Vec<_>>().join("\n")
            + "\n")
    }

    fn command(&self, program: &str) -> Command {
        let here = self.directory.display();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        for option in [
            format!("Dir::Etc::sourcelist={here}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State={here}/state"),
            format!("Dir::State::status={here}/status"),
            format!("Dir::Cache={here}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // The download user of the system may not enter our directory.
            format!("APT::Sandbox::User={}", if rustix::process::getuid().is_root() { "root" } else { "" }),
            // The system's locks guard the system's state, which is not used.
            "Debug::NoLocking=1".to_owned(),
            // Hooks of container images that empty the system's cache.
            "APT::Update::Post-Invoke=".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Package lists are fetched again after half a day: Debian removes old security updates from its mirrors.
fn half_days_since_1970() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() / (12 * 3600))
}

fn downloads() -> Result<tempfile::TempDir> {
    tempfile::tempdir().context(|| "create a directory for downloads")
}

/// Unpacks every package in `from`; documentation stays out.
fn unpack_all(from: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root).context(|| format!("create {}", root.display()))?;
    let entries = fs::read_dir(from).context(|| format!("list {}", from.display()))?;
    for entry in entries {
        let path = entry.context(|| format!("list {}", from.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root), "dpkg")?;
        }
    }
    for directory in ["usr/share/doc", "usr/share/man", "usr/share/locale"] {
        let path = root.join(directory);
        if path.exists() {
            fs::remove_dir_all(&path).context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The text of a sources.list for the release, its updates and its backports.
fn sources() -> Result<String> {
    let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists()).ok_or(Error::NotInstalled {
        program: "Debian's archive keyring".to_owned(),
        package: "debian-archive-keyring",
    })?;
    let mirror = std::env::var("CLEAVE_DEBIAN_MIRROR").unwrap_or_else(|_| system_mirror());
    let mirror = mirror.trim_end_matches('/');
    let mut text = String::new();
    for (archive, suite) in [
        (mirror.to_owned(), RELEASE),
        (mirror.to_owned(), "bookworm-updates"),
        (mirror.to_owned(), BACKPORTS),
        (format!("{mirror}-security"), "bookworm-security"),
    ] {
        text += &format!("deb [arch=amd64 signed-by={keyring}] {archive} {suite} main\n");
    }
    Ok(text)
}

/// The mirror that this machine's own apt uses, when it is a full one.
fn system_mirror() -> String {
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let uris: Vec<&str> = targets.lines().map(|line| line.trim_end_matches('/')).collect();
    // A mirror without the security archive beside it is only half of what is needed.
    uris.iter()
        .find(|uri| uri.ends_with("/debian") && uris.contains(&format!("{uri}-security").as_str()))
        .map_or_else(|| DEFAULT_MIRROR.to_owned(), |uri| (*uri).to_owned())
}

/// Compares names with runs of digits as numbers: 6.1.0-9 before 6.1.0-10.
fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (number_a, rest_a) = leading_number(a);
        let (number_b, rest_b) = leading_number(b);
        let order = match (number_a, number_b) {
            (Some(x), Some(y)) => x.cmp(&y),
            _ => a.chars().next().cmp(&b.chars().next()),
        };
        if order != Ordering::Equal || a.is_empty() {
            return order;
        }
        (a, b) = match (number_a, number_b) {
            (Some(_), Some(_)) => (rest_a, rest_b),
            _ => (skip_one(a), skip_one(b)),
        };
    }
}

fn leading_number(text: &str) -> (Option<u64>, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].parse().ok(), &text[end..])
}

fn skip_one(text: &str) -> &str {
    let mut chars = text.chars();
    chars.next();
    chars.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_are_ordered_by_their_numbers() {
        let mut names =
            ["6.1.0-56-amd64", "6.1.0-9-amd64", "6.12.117+deb12", "6.12.95+deb12", "6.1.0-56-amd6"];
        names.sort_by(|a, b| natural_order(a, b));
        assert_eq!(
            names,
            ["6.1.0-9-amd64", "6.1.0-56-amd6", "6.1.0-56-amd64", "6.12.95+deb12", "6.12.117+deb12"]
        );
    }
}
