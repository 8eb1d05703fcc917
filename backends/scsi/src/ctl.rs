//! The control socket's commands: media change, units come and go, disks grow.
//!
//! A confined daemon opens no file: `ctl` does it, as its own user, and sends the descriptor along. The path comes too: it
//! is what messages call the image, and what a successor of this process opens.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use cleave_common::control::{ControlError, Request, nothing, value_of};
use cleave_common::exit::Failure;
use cleave_common::options;
use cleave_runtime::Control;
use cleave_storage::{Image, ImageError, ImageFormat};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use tracing::info;

use crate::address::Address;
use crate::bus::{Loaded, Slot};
use crate::config::{CdromConfig, KindConfig, LunConfig, UnitConfig};
use crate::controller::Controller;
use crate::events::Event;
use crate::orders::{Order, Ticket, Which};
use crate::request::Response;
use crate::units;

/// A unit as people and programs see it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct UnitInfo {
    unit: String,
    kind: &'static str,
    /// The image, if there is one.
    path: Option<PathBuf>,
    bytes: Option<u64>,
    read_only: bool,
    tray_open: bool,
    locked: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(deserialize_with = "address")]
    unit: Address,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Eject {
    #[serde(deserialize_with = "address")]
    unit: Address,
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    #[serde(deserialize_with = "address")]
    unit: Address,
    path: PathBuf,
    #[serde(default)]
    force: bool,
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Address, D::Error> {
    options::from_word(deserializer)
}

/// What the control socket steers.
pub(crate) struct Ctl(pub(crate) Arc<Controller>);

impl Control for Ctl {
    fn commands(&self) -> &'static [&'static str] {
        &["query-units", "eject", "change", "add-disk", "add-cdrom", "remove", "resize"]
    }

    fn execute(&self, mut request: Request) -> Result<Value, ControlError> {
        if request.command == "query-units" {
            return value_of(&self.units());
        }
        if !self.0.is_settled() {
            return Err(ControlError::new(
                "the units are still those of a predecessor, whose driver has not come back: change them once it has",
            ));
        }
        match request.command.as_str() {
            "eject" => {
                let Eject { unit, force } = request.arguments()?;
                self.eject(unit, force)?;
            }
            "change" => {
                let change: Change = request.arguments()?;
                let file = request.single_fd()?;
                self.change(change, file)?;
            }
            "add-disk" => {
                texts(&mut request.arguments, &["disk", "serial", "product"]);
                let config: LunConfig = request.arguments()?;
                let file = request.single_fd()?;
                return self.add_disk(config, file);
            }
            "add-cdrom" => {
                texts(&mut request.arguments, &["path", "serial"]);
                let config: CdromConfig = request.arguments()?;
                let file = if config.path.is_some() { Some(request.single_fd()?) } else { None };
                return self.add_cdrom(config, file);
            }
            "remove" => {
                let Named { unit } = request.arguments()?;
                self.remove(unit)?;
            }
            _ => {
                let Named { unit } = request.arguments()?;
                self.resize(unit)?;
            }
        }
        Ok(nothing())
    }
}

/// A word that looks like a number is a word where one is meant.
fn texts(arguments: &mut Map<String, Value>, keys: &[&str]) {
    for key in keys {
        if let Some(value @ Value::Number(_)) = arguments.get_mut(*key) {
            *value = Value::String(value.to_string());
        }
    }
}

fn no_unit(address: Address) -> ControlError {
    ControlError::not_found(format!("there is no unit {address}: query-units lists them"))
}

fn refused(error: impl std::fmt::Display) -> ControlError {
    ControlError::new(error.to_string())
}

fn refused_image(error: &ImageError) -> ControlError {
    ControlError::new(cleave_common::exit::one_line(error))
}

impl Ctl {
    fn units(&self) -> Vec<UnitInfo> {
        let bus = self.0.bus();
        bus.slots()
            .map(|(address, slot)| {
                let (tray_open, locked) =
                    bus.unit(address, |unit| (unit.is_tray_open(), unit.is_locked())).unwrap_or_default();
                let image = slot.loaded.as_ref().map(|loaded| &loaded.image);
                UnitInfo {
                    unit: address.to_string(),
                    kind: match slot.config.kind {
                        KindConfig::Disk(_) => "disk",
                        KindConfig::Cdrom(_) => "cdrom",
                    },
                    path: image.map(|image| image.path().to_owned()),
                    bytes: image.map(|image| image.len()),
                    read_only: image.is_none_or(|image| image.is_read_only()),
                    tray_open,
                    locked,
                }
            })
            .collect()
    }

    /// What follows a change of units.
    fn changed(&self, event: Event, unit: Address) -> Result<(), ControlError> {
        self.0.mail.post_all(|| Order::Look);
        self.0.events.tell(event, unit);
        self.0.save().map_err(|error| {
            ControlError::new(format!(
                "it is done, but a restart of this daemon will not know of it: {error}"
            ))
        })
    }

    fn eject(&self, address: Address, force: bool) -> Result<(), ControlError> {
        let ejected = self.0.bus_mut().unit_and_image(address, |unit, loaded| {
            unit.eject(force)?;
            *loaded = None;
            Ok(())
        });
        let asked = ejected.map_err(|_| no_unit(address))?;
        if asked.is_ok() {
            info!("unit {address}: the medium is out");
        }
        // A guest that has the tray locked hears of the wish.
        self.changed(Event::MEDIUM, address)?;
        asked.map_err(|error: cleave_scsi::EjectError| refused(error))
    }

    fn change(&self, change: Change, file: OwnedFd) -> Result<(), ControlError> {
        let Change { unit: address, path, force } = change;
        let is_drive =
            self.0.bus().slot(address).map(|slot| matches!(slot.config.kind, KindConfig::Cdrom(_)));
        match is_drive {
            None => return Err(no_unit(address)),
            Some(false) => {
                return Err(ControlError::new(format!("unit {address} is a disk, whose medium stays")));
            }
            Some(true) => {}
        }
        let options = units::cdrom_options(&path);
        let image = Image::from_file(File::from(file), &options).map_err(|error| refused_image(&error))?;
        let image = Arc::new(image);
        let medium = units::cd_medium(&image);
        let changed = self.0.bus_mut().unit_and_image(address, |unit, loaded| {
            if unit.has_medium() {
                unit.eject(force).map_err(refused)?;
                *loaded = None;
            }
            unit.load(medium).map_err(refused)?;
            *loaded = Some(Loaded::new(image));
            Ok(())
        });
        let outcome = changed.map_err(|_| no_unit(address))?;
        if outcome.is_ok() {
            info!("unit {address}: {} is in", path.display());
        }
        self.changed(Event::MEDIUM, address)?;
        outcome
    }

    fn add_disk(&self, config: LunConfig, file: OwnedFd) -> Result<Value, ControlError> {
        config.throttle.validate().map_err(refused)?;
        let options = units::disk_options(&config);
        if options.format != ImageFormat::Raw {
            return Err(refused_image(&ImageError::NotRaw(options.path)));
        }
        let image = Image::from_file(File::from(file), &options).map_err(|error| refused_image(&error))?;
        self.add(KindConfig::Disk(Box::new(config)), Some(Arc::new(image)))
    }

    fn add_cdrom(&self, config: CdromConfig, file: Option<OwnedFd>) -> Result<Value, ControlError> {
        let image = match (&config.path, file) {
            (Some(path), Some(file)) => {
                let options = units::cdrom_options(path);
                let image =
                    Image::from_file(File::from(file), &options).map_err(|error| refused_image(&error))?;
                Some(Arc::new(image))
            }
            _ => None,
        };
        self.add(KindConfig::Cdrom(config), image)
    }

    fn add(&self, kind: KindConfig, image: Option<Arc<Image>>) -> Result<Value, ControlError> {
        let mut bus = self.0.bus_mut();
        let address = kind.address(|address| bus.has(address)).map_err(refused)?;
        let config = UnitConfig { address, kind };
        let unit = units::make(&config, image.as_deref()).map_err(refused)?;
        let slot = Slot { is_hot: true, ..Slot::new(config, image, &self.0.nudges) };
        bus.add(slot, unit);
        drop(bus);
        info!("unit {address} has come");
        self.changed(Event::Rescan, address)?;
        value_of(&serde_json::json!({"unit": address.to_string()}))
    }

    fn remove(&self, address: Address) -> Result<(), ControlError> {
        self.0.bus_mut().remove(address).ok_or_else(|| no_unit(address))?;
        let ticket = Ticket::new(|_| {});
        self.0.mail.post_all(|| Order::End {
            which: Which::All(address),
            response: Some(Response::Aborted),
            ticket: ticket.clone(),
        });
        info!("unit {address} is gone");
        self.changed(Event::Removed, address)
    }

    fn resize(&self, address: Address) -> Result<(), ControlError> {
        if !self.0.bus().has(address) {
            return Err(no_unit(address));
        }
        look_at_size(&self.0, address).map_err(|error| refused_image(&error))
    }
}

/// Whether disks have grown or shrunk; whoever waits for room may have some.
///
/// # Errors
/// A disk cannot be looked at, or has become none; the others have been looked at.
pub(crate) fn look_at_sizes(controller: &Controller) -> Result<(), ImageError> {
    let all: Vec<Address> = controller.bus().slots().map(|(address, _)| address).collect();
    let looked: Vec<_> = all.into_iter().map(|address| look_at_size(controller, address)).collect();
    controller.nudges.nudge_all();
    looked.into_iter().collect()
}

fn look_at_size(controller: &Controller, address: Address) -> Result<(), ImageError> {
    let bus = controller.bus();
    let Some(loaded) = bus.slot(address).and_then(|slot| slot.loaded.as_ref()) else { return Ok(()) };
    let image = &loaded.image;
    // Its size stays while it is in use.
    if image.format() == ImageFormat::Qcow2 || !image.reload()? {
        return Ok(());
    }
    let resized = bus.unit(address, |unit| unit.resize(image.len() / u64::from(unit.block_size())));
    drop(bus);
    match resized {
        Ok(Ok(())) => controller.events.tell(Event::CAPACITY, address),
        Ok(Err(error)) => tracing::warn!("unit {address}: {error}"),
        Err(_) => {}
    }
    Ok(())
}

/// Opens, for `ctl`, what `command` is about: the daemon cannot.
pub(crate) fn open(command: &str, arguments: &mut Map<String, Value>) -> Result<Vec<OwnedFd>, Failure> {
    let key = match command {
        "change" | "add-cdrom" => "path",
        "add-disk" => "disk",
        _ => return Ok(Vec::new()),
    };
    let Some(path) = arguments.get(key) else { return Ok(Vec::new()) };
    let path = path.as_str().map_or_else(|| path.to_string(), str::to_owned);
    let failed = |error| Failure::usage(format!("{path}: {error}"));
    let whole = std::fs::canonicalize(&path).map_err(failed)?;
    let is_on = |value: &Value| {
        value.as_bool() == Some(true) || value.as_str().and_then(options::switch) == Some(true)
    };
    let read_only = arguments.get("readonly").is_some_and(is_on);
    let writes = command == "add-disk" && !read_only;
    if command == "add-disk" && arguments.contains_key("readonly") {
        arguments.insert("readonly".to_owned(), Value::Bool(read_only));
    }
    let file = OpenOptions::new().read(true).write(writes).open(&whole).map_err(failed)?;
    arguments.insert(key.to_owned(), Value::String(whole.to_string_lossy().into_owned()));
    Ok(vec![file.into()])
}
