//! Daemons that are not ours: published ones, and ones that misbehave. The latter speak vhost-user as far as they
//! are told and then show one fault.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{Channel, Config, FrontendRequest, Message, VringState};

use crate::cache::{self, Cache};
use crate::error::{Context, Result, run};

const QMP_CLIENT: &str = "qemu.qmp==0.0.6";
const RNG_DAEMON: &str = "vhost-device-rng@0.1.0";

/// The program of the published crate vhost-device-rng, a random number generator in a daemon.
pub fn rng_daemon(cache: &Cache) -> Result<PathBuf> {
    let place = cache.entry("vhost-device-rng", &cache::key(&[RNG_DAEMON, "1"]), |place| {
        eprintln!("lab: building {RNG_DAEMON} (half a minute)");
        let mut command = Command::new("cargo");
        command.args(["install", "--locked", "--quiet", RNG_DAEMON, "--root"]).arg(place);
        // Away from the workspace, whose build settings are not this crate's.
        command.arg("--target-dir").arg(place.join("build")).current_dir("/");
        run(&mut command, "rustup")?;
        std::fs::remove_dir_all(place.join("build")).context(|| "remove the build of vhost-device-rng")
    })?;
    Ok(place.join("bin/vhost-device-rng"))
}

/// The Python client for QMP that QEMU publishes: what PYTHONPATH has to name.
pub fn qmp_client(cache: &Cache) -> Result<PathBuf> {
    cache.entry("qemu-qmp", &cache::key(&[QMP_CLIENT, "1"]), |place| {
        eprintln!("lab: fetching {QMP_CLIENT}");
        let mut command = Command::new("/usr/bin/python3");
        command.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            QMP_CLIENT,
        ]);
        run(command.arg("--target").arg(place), "python3 python3-pip").map(|_| ())
    })
}

/// What a daemon does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers until the first ring is enabled, then never again; the connection stays open.
    SilentOnceRunning,
    /// Answers GET_FEATURES, then nothing; the connection stays open.
    StopsInTheHandshake,
    /// Takes connections and never answers anything.
    NeverAnswers,
    /// Offers a device from before virtio 1.
    NoVersion1,
    /// Answers with bytes that are no message.
    Garbage,
    /// Closes each connection at once.
    HangsUp,
}

/// A daemon with a fault, in threads of this process. It listens until the process ends.
#[derive(Debug)]
pub struct FaultyDaemon {
    answered: Arc<AtomicUsize>,
}

impl FaultyDaemon {
    pub fn listen(socket: &Path, fault: Fault) -> Result<Self> {
        let listener = UnixListener::bind(socket).context(|| format!("listen at {}", socket.display()))?;
        let answered = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&answered);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(stream, fault, &count);
            }
        });
        Ok(Self { answered })
    }

    /// How many messages were answered or taken so far: shows how far a frontend got.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }
}

/// Serves one connection until its other end closes it.
fn serve(stream: UnixStream, fault: Fault, answered: &AtomicUsize) {
    match fault {
        Fault::HangsUp => return,
        Fault::Garbage => {
            let mut stream = stream;
            // Whether the frontend still listens is its own business.
            let _ = stream.write_all(&[0x5a; 256]);
            std::thread::sleep(Duration::from_secs(2));
            return;
        }
        _ => {}
    }
    let mut channel = Channel::new(stream);
    let mut silent = fault == Fault::NeverAnswers;
    while let Ok(Some(message)) = channel.recv(None) {
        if silent {
            continue;
        }
        if answer(&mut channel, &message, fault).is_none() {
            return;
        }
        answered.fetch_add(1, Ordering::SeqCst);
        silent = match FrontendRequest::try_from(message.request) {
            Ok(FrontendRequest::GetFeatures) => fault == Fault::StopsInTheHandshake,
            Ok(FrontendRequest::SetVringEnable) => fault == Fault::SilentOnceRunning,
            _ => false,
        };
    }
}

/// Answers as a good daemon with one queue would. None when the connection is lost.
fn answer(channel: &mut Channel, message: &Message, fault: Fault) -> Option<()> {
    use FrontendRequest as Request;
    let request = message.request;
    let features = match fault {
        Fault::NoVersion1 => virtio::PROTOCOL_FEATURES,
        _ => virtio::PROTOCOL_FEATURES | virtio::VERSION_1,
    };
    match Request::try_from(request).ok()? {
        Request::GetFeatures => channel.reply(request, &features, &[], None),
        Request::GetProtocolFeatures => {
            let offered = protocol::REPLY_ACK | protocol::CONFIG | protocol::MQ;
            channel.reply(request, &offered, &[], None)
        }
        Request::GetQueueNum => channel.reply(request, &1u64, &[], None),
        Request::GetConfig => channel.reply(request, &message.payload::<Config>().ok()?, &[], None),
        Request::GetVringBase => {
            let state = VringState { index: message.payload::<VringState>().ok()?.index, num: 0 };
            channel.reply(request, &state, &[], None)
        }
        _ if message.flags.needs_reply() => channel.reply(request, &0u64, &[], None),
        _ => Ok(()),
    }
    .ok()
}
