//! What a backend says of itself.

use cleave_common::vhost_user::features::{protocol, virtio};

use super::{Check, Outcome, Subject, demand, demand_status, feature, needs};
use crate::driver::{Buffer, IoStatus, RequestKind};

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "features",
        demand: "VERSION_1 and protocol features are offered, packed rings are not alone",
        run: features,
    },
    Check { name: "protocol-features", demand: "CONFIG, and GET_QUEUE_NUM with MQ", run: protocol_features },
    Check { name: "config-space", demand: "capacity, block size and queues make sense", run: config_space },
    Check {
        name: "config-parts",
        demand: "a part of config space is that part of the whole",
        run: config_parts,
    },
    Check { name: "get-id", demand: "GET_ID gives at most 20 bytes of ASCII", run: get_id },
];

fn features(subject: &Subject) -> Outcome {
    let negotiated = subject.frontend()?.negotiate(u64::MAX)?;
    let offered = negotiated.offered;
    demand(offered & virtio::VERSION_1 != 0, || "VIRTIO_F_VERSION_1 is not offered".into())?;
    demand(offered & virtio::PROTOCOL_FEATURES != 0, || "protocol features are not offered".into())?;
    demand(offered & feature::CONFIG_WCE == 0 || offered & feature::FLUSH != 0, || {
        "CONFIG_WCE is offered, and FLUSH is not: a write cache nobody can empty".into()
    })
}

fn protocol_features(subject: &Subject) -> Outcome {
    let negotiated = subject.frontend()?.negotiate(u64::MAX)?;
    let features = negotiated.protocol_features;
    demand(features & protocol::CONFIG != 0, || "CONFIG is not offered: nobody learns the capacity".into())?;
    needs(features & protocol::MQ != 0, "the protocol feature MQ")?;
    demand((1..=65535).contains(&negotiated.num_queues), || {
        format!("GET_QUEUE_NUM says {}", negotiated.num_queues)
    })
}

fn config_space(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let config = driver.config()?;
    demand(config.sectors > 0, || "the capacity is 0".into())?;
    let offered = driver.negotiated.offered;
    let size = config.blk_size;
    demand(offered & feature::BLK_SIZE == 0 || (size >= 512 && size.is_power_of_two()), || {
        format!("the block size is {size}")
    })?;
    let (wire, space) = (driver.negotiated.num_queues, u64::from(config.num_queues));
    let counts = driver.negotiated.protocol_features & protocol::MQ != 0 && offered & feature::MQ != 0;
    demand(!counts || wire >= space, || format!("config space says {space} queues, and GET_QUEUE_NUM {wire}"))
}

fn config_parts(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let whole = driver.frontend.config(0, 60)?;
    for (offset, len) in [(0, 8), (20, 4), (34, 2), (8, 52)] {
        let part = driver.frontend.config(offset, len)?;
        demand(part == whole[offset as usize..offset as usize + len], || {
            format!("{len} bytes from {offset} are {part:02x?}")
        })?;
    }
    Ok(())
}

fn get_id(subject: &Subject) -> Outcome {
    let mut driver = subject.driver()?;
    let data = driver.data;
    driver.ram.write(data, &[0xff; 32])?;
    let (status, _) = driver.request(RequestKind::GetId, 0, &[Buffer::to_write(data, 20)])?;
    demand_status("GET_ID", status, IoStatus::Ok)?;
    let id = driver.ram.read(data, 32)?;
    let len = id.iter().position(|byte| *byte == 0 || *byte == 0xff).unwrap_or(id.len());
    demand(len <= 20 && id[..len].is_ascii() && id[20..] == [0xff; 12], || format!("the id is {id:02x?}"))
}
