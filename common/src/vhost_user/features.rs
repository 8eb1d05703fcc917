//! Feature bits that frontends and backends negotiate, whatever the device type.

/// Virtio and vhost feature bits: GET_FEATURES, SET_FEATURES (virtio 1.2, 6; vhost-user, "Feature bits"). Bits 0 to
/// 23 and 50 to 127 belong to the device type.
pub mod virtio {
    /// Writes to guest memory are logged (vhost only; never offered to a guest).
    pub const LOG_ALL: u64 = 1 << 26;
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The backend understands GET_PROTOCOL_FEATURES (vhost-user only; never offered to a guest).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    pub const SR_IOV: u64 = 1 << 37;
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    pub const NOTIF_CONFIG_DATA: u64 = 1 << 39;
    pub const RING_RESET: u64 = 1 << 40;
}

/// Protocol feature bits: GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES (vhost-user, "Protocol features").
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const MTU: u64 = 1 << 4;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CROSS_ENDIAN: u64 = 1 << 6;
    pub const CRYPTO_SESSION: u64 = 1 << 7;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const XEN_MMAP: u64 = 1 << 17;
    pub const SHARED_OBJECT: u64 = 1 << 18;
    pub const DEVICE_STATE: u64 = 1 << 19;
}
