//! The protocol's numbered errors: SDKs show them, and some users look for the numbers.

use std::fmt;

use crate::store::StoreError;

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Refusal {
    /// A refusal in words of our own.
    pub(crate) fn because(sentence: impl fmt::Display) -> Self {
        Self(sentence.to_string())
    }

    /// One more channel would be too many.
    pub(crate) fn channels(most: usize) -> Self {
        Self(format!("there are {most} channels, the most this broker allows: delete some, or raise the limit"))
    }

    /// A token was refused.
    pub(crate) fn authentication(why: &str) -> Self {
        Self(format!("Error 421: authentication verification failed, {why}"))
    }

    /// Events and requests tell refusals as a status. Not `UNAVAILABLE`, which SDKs take for a lost connection.
    pub(crate) fn status(&self) -> tonic::Status {
        tonic::Status::internal(&*self.0)
    }
}

impl From<StoreError> for Refusal {
    fn from(cause: StoreError) -> Self {
        Self(cause.to_string())
    }
}

macro_rules! refusals {
    ($($name:ident $number:literal $text:literal)*) => {
        impl Refusal {
            $(
                #[doc = concat!("Error ", $number, ": ", $text)]
                pub(crate) fn $name() -> Self {
                    Self(concat!("Error ", $number, ": ", $text).to_owned())
                }
            )*
        }
    };
}

refusals! {
    no_client 101 "invalid clientID value, cannot be empty"
    no_channel 102 "invalid channel value, cannot be empty"
    wildcard 107 "invalid channel value, no wildcards are allowed"
    white_space 108 "invalid channel value, no white spaces are allowed"
    no_timeout 109 "invalid set timeout value, cannot be 0 or negative"
    empty_message 110 "invalid message, cannot be empty"
    no_start 111 "invalid subscription type, cannot be undefined or 0"
    start_sequence 112 "invalid subscription type start at sequence value, cannot by 0 or negative"
    start_time 113 "invalid subscription type start at time value, cannot by 0 or negative"
    start_delta 114 "invalid subscription type start at time delta value, cannot by 0 or negative"
    empty_request 115 "invalid request, cannot be empty"
    cache_ttl 116 "invalid cache ttl value, cannot be 0 or negative"
    no_request_id 117 "invalid request id, cannot be empty"
    not_a_store 118 "event store parameters were set but subscribe type is not event store"
    ends_with_dot 119 "invalid channel value, cannot end with `.`"
    queue_name 120 "invalid queue name value, cannot be empty, contains wildcards ,white spaces and end with dot"
    receive_count_of_request 122 "max messages should be between 1 and max message setting in kubemq config  "
    nothing_to_ack 124 "no active message to ack"
    wrong_sequence 125 "ack sequence cannot be 0 or negative"
    nothing_to_send 126 "no active message to send"
    visibility 127 "invalid visibility time, cannot be negative or exceed setting in kubemq config"
    already_active 128 "subscription to queue is already active"
    visibility_expired 129 "current visibility timer expired"
    not_resent 130 "error during send message to queue"
    no_message 131 "invalid queue message"
    stream_request 132 "invalid stream queue messages request type"
    expiration 133 "invalid expiration seconds, exceed max expiration seconds setting in kubemq config"
    receive_count 134 "invalid max received count, cannot be negative or exceed max receive count setting in kubemq config"
    delay 135 "invalid delay seconds, exceed max delay seconds setting in kubemq config"
    wait 136 "invalid wait timeout, value cannot be negative or exceed max wait timeout seconds setting in kubemq config"
    nothing_to_reject 137 "no active message to reject"
    nothing_came 138 "no new message in queue, wait time expired"
    request_type 206 "invalid request type"
    subscribe_type 207 "invalid subscribe type"
    timeout 301 "timeout for request message"
    shutdown 409 "server is in shutdown mode"
    access 412 "access denied to resource"
}
