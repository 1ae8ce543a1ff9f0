//! The paths of the API, so that server and clients can't drift apart.

pub const OPENAPI: &str = "/openapi.json";
pub const SERVER: &str = "/v1/server";
pub const EVENTS: &str = "/v1/events";
pub const INSTANCES: &str = "/v1/instances";
pub const INSTANCE: &str = "/v1/instances/{name}";
pub const INSTANCE_START: &str = "/v1/instances/{name}/start";
pub const INSTANCE_STOP: &str = "/v1/instances/{name}/stop";
pub const INSTANCE_RESTART: &str = "/v1/instances/{name}/restart";
pub const INSTANCE_RECOVER: &str = "/v1/instances/{name}/recover";
pub const INSTANCE_EXEC: &str = "/v1/instances/{name}/exec";
pub const INSTANCE_LOG: &str = "/v1/instances/{name}/log";
/// Renews the lease of a throw-away instance.
pub const INSTANCE_LEASE: &str = "/v1/instances/{name}/lease";
pub const INSTANCE_FORK: &str = "/v1/instances/{name}/fork";
pub const INSTANCE_IDENTITY: &str = "/v1/instances/{name}/identity";
/// WebSocket to a TCP port in the guest: binary messages both ways.
pub const INSTANCE_PORT: &str = "/v1/instances/{name}/port";
pub const INSTANCE_SUSPEND: &str = "/v1/instances/{name}/suspend";
pub const INSTANCE_CLONE: &str = "/v1/instances/{name}/clone";
pub const INSTANCE_RENAME: &str = "/v1/instances/{name}/rename";
pub const INSTANCE_SNAPSHOTS: &str = "/v1/instances/{name}/snapshots";
pub const INSTANCE_SNAPSHOT: &str = "/v1/instances/{name}/snapshots/{snapshot}";
pub const INSTANCE_RESTORE: &str = "/v1/instances/{name}/snapshots/{snapshot}/restore";
/// The whole instance as an archive.
pub const INSTANCE_EXPORT: &str = "/v1/instances/{name}/export";
/// The instance as `image.tar.zst`: an image made of it.
pub const INSTANCE_PACK: &str = "/v1/instances/{name}/pack";
/// Takes an archive.
pub const IMPORT: &str = "/v1/import";
/// WebSocket to the serial console: binary messages both ways.
pub const INSTANCE_CONSOLE: &str = "/v1/instances/{name}/console";
/// How to reach it with an ordinary SSH client.
pub const INSTANCE_SSH: &str = "/v1/instances/{name}/ssh";
/// The snapshots of all instances.
pub const SNAPSHOTS: &str = "/v1/snapshots";
pub const HOST: &str = "/v1/host";
pub const NETWORKS: &str = "/v1/networks";
pub const USAGE: &str = "/v1/usage";
pub const AUTHENTICATE: &str = "/v1/authenticate";
pub const TEMPLATES: &str = "/v1/templates";
pub const TEMPLATE: &str = "/v1/templates/{id}";
pub const TEMPLATES_PRUNE: &str = "/v1/templates/prune";
pub const SETTINGS: &str = "/v1/settings";
pub const SETTING: &str = "/v1/settings/{key}";
pub const PURGE: &str = "/v1/purge";
pub const CATALOG: &str = "/v1/catalog";
pub const IMAGES: &str = "/v1/images";
/// An image is named by a digest (or its beginning), a tag or a source; so no action may stand beside it.
pub const IMAGE: &str = "/v1/images/{image}";
/// The image as `image.tar.zst`.
pub const IMAGE_EXPORT: &str = "/v1/images/{image}/export";
pub const IMAGE_TAG: &str = "/v1/image-tags/{tag}";
pub const IMAGES_PRUNE: &str = "/v1/image-actions/prune";
pub const IMAGES_VERIFY: &str = "/v1/image-actions/verify";
/// Take an image's bytes, to keep it or only to judge it.
pub const IMAGES_IMPORT: &str = "/v1/image-actions/import";
pub const IMAGES_INSPECT: &str = "/v1/image-actions/inspect";
/// Takes a recipe and gives the image that it makes.
pub const IMAGES_BUILD: &str = "/v1/image-actions/build";
pub const OPERATIONS: &str = "/v1/operations";
pub const OPERATION: &str = "/v1/operations/{id}";
pub const OPERATION_EVENTS: &str = "/v1/operations/{id}/events";
/// Long poll: answers when the operation is over, or with its present state after `?seconds=`.
pub const OPERATION_WAIT: &str = "/v1/operations/{id}/wait";

/// Fills the one parameter of a path; the value is percent-encoded.
pub fn fill(path: &str, value: &str) -> String {
    let Some((before, rest)) = path.split_once('{') else {
        return path.to_owned();
    };
    let after = rest.split_once('}').map_or("", |(_, after)| after);
    let mut filled = String::from(before);
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            filled.push(byte as char);
        } else {
            use std::fmt::Write;
            // Writing to a String can't fail.
            let _ = write!(filled, "%{byte:02X}");
        }
    }
    filled + after
}

/// As [`fill`], for a path with two parameters.
pub fn fill_two(path: &str, first: &str, second: &str) -> String {
    fill(&fill(path, first), second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_can_not_leave_its_segment() {
        assert_eq!(fill(INSTANCE_START, "foo"), "/v1/instances/foo/start");
        assert_eq!(fill(INSTANCE, "../x?y"), "/v1/instances/..%2Fx%3Fy");
        assert_eq!(
            fill_two(INSTANCE_SNAPSHOT, "{a", "b"),
            "/v1/instances/%7Ba/snapshots/b"
        );
    }
}
