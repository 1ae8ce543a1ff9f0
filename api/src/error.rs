//! The one place where errors become API replies: [`pileus_base::Error`] → [`ErrorBody`] → HTTP status.

use pileus_base::{Class, Code, Error};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What every reply with a status of 400 or above holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorReply {
    pub error: ErrorBody,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub code: Code,
    /// Whose fault it is.
    pub class: Class,
    /// One sentence: what happened and why.
    pub message: String,
    /// What to do next, if it depends on the case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// Longer material, line by line: a console's tail, a program's output.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

impl From<&Error> for ErrorBody {
    fn from(err: &Error) -> Self {
        Self {
            code: err.code,
            class: err.class(),
            message: err.message.clone(),
            advice: err.advice.clone(),
            details: err.details.clone(),
        }
    }
}

impl From<Error> for ErrorBody {
    fn from(err: Error) -> Self {
        (&err).into()
    }
}

impl From<ErrorBody> for Error {
    fn from(body: ErrorBody) -> Self {
        let mut err = Error::new(body.code, body.message);
        err.advice = body.advice;
        err.details = body.details;
        err
    }
}

/// The HTTP status of a code.
pub fn http_status(code: Code) -> u16 {
    match code {
        Code::InstanceNotFound
        | Code::ImageNotFound
        | Code::OperationNotFound
        | Code::TemplateNotFound
        | Code::SnapshotNotFound
        | Code::NetworkNotFound
        | Code::SettingNotFound => 404,
        Code::PermissionDenied | Code::WrongPassphrase => 403,
        Code::InstanceExists
        | Code::SnapshotExists
        | Code::InstanceDeleted
        | Code::WrongState
        | Code::ImageInUse
        | Code::NoTemplate
        | Code::StorageLocked => 409,
        Code::ImageTooLarge => 413,
        Code::NoSpace | Code::NoMemory => 507,
        Code::TimedOut | Code::UploadStalled => 408,
        Code::Cancelled | Code::Interrupted => 410,
        _ => match code.class() {
            Class::User => 400,
            Class::Guest => 502,
            Class::Host => 503,
            Class::Cancelled => 410,
            Class::Internal => 500,
        },
    }
}
