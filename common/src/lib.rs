//! What both sides of the virtqueue need, and nothing that only one side needs.
//!
//! The VMM (`cleave`) and the device daemons (`cleave-*`) never depend on each other; they meet in this crate
//! and on the vhost-user socket.

pub mod cli;
pub mod control;
pub mod cpus;
pub mod exit;
pub mod forward;
pub mod interface;
pub mod logging;
pub mod mac;
pub mod options;
pub mod passt;
pub mod port;
pub mod sandbox;
pub mod size;
pub mod socket;
pub mod throttle;
pub mod vhost_user;
pub mod virtio;
