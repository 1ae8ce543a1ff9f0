//! Archives of whole instances: `GET /v1/instances/{name}/export` answers with one, `POST /v1/import` takes one.
//! Their form is described in `images/src/archive/`.

use pileus_base::InstanceName;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

/// The media type of an archive.
pub const MEDIA_TYPE: &str = "application/vnd.pileus.instance+zstd";

/// The media type of a packed image.
pub const IMAGE_MEDIA_TYPE: &str = "application/vnd.pileus.image+zstd";

/// The header of an export's reply that names its operation: it tells warnings, progress, and why an archive breaks
/// off. An archive that was cut off is refused by an import in any case.
pub const OPERATION_HEADER: &str = "pileus-operation";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImportQuery {
    /// Name of the new instance; the one in the archive if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub name: Option<InstanceName>,
}
