//! Who sends.

use crate::Message;

/// Who sends: written into the headers of every message of a bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The component, such as `billing`.
    pub component: String,
    /// Its version.
    pub version: String,
    /// This instance of it.
    pub client_id: String,
}

/// Header with the sending component's name.
pub const SENDER_COMPONENT: &str = "sender-component";
/// Header with the sending component's version.
pub const SENDER_VERSION: &str = "sender-version";
/// Header with the sending instance.
pub const SENDER_CLIENT: &str = "sender-client";

impl Identity {
    pub(crate) fn sign(&self, message: &mut Message) {
        message.add_wire_header(SENDER_COMPONENT, self.component.clone());
        message.add_wire_header(SENDER_VERSION, self.version.clone());
        message.add_wire_header(SENDER_CLIENT, self.client_id.clone());
    }
}
