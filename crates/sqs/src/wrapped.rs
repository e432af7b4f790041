//! SNS's own JSON around a message, which a subscription without raw delivery puts on its queue.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::poll::TEXT;

#[derive(Debug, Deserialize)]
struct Notification {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "TopicArn")]
    topic: String,
    #[serde(rename = "Message")]
    message: String,
    #[serde(rename = "MessageAttributes", default)]
    attributes: BTreeMap<String, Attribute>,
}

#[derive(Debug, Deserialize)]
struct Attribute {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Value")]
    value: String,
}

/// What a notification holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Inner {
    pub(crate) body: String,
    pub(crate) attributes: Vec<(String, String)>,
    /// There are attributes that are no strings.
    pub(crate) lossy: bool,
}

/// The body and the attributes inside, if it is a notification.
pub(crate) fn unwrap(body: &str) -> Option<Inner> {
    if !body.starts_with('{') {
        return None;
    }
    let found: Notification = serde_json::from_str(body).ok()?;
    if found.kind != "Notification" || !found.topic.starts_with("arn:") {
        return None;
    }
    let text = |(name, attribute): (String, Attribute)| {
        (!attribute.kind.starts_with("Binary")).then_some((name, attribute.value))
    };
    let lossy = found.attributes.values().any(|attribute| attribute.kind != TEXT);
    Some(Inner { body: found.message, attributes: found.attributes.into_iter().filter_map(text).collect(), lossy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_is_unwrapped_and_nothing_else() {
        let body = r#"{"Type": "Notification", "MessageId": "m", "TopicArn": "arn:aws:sns:eu-west-1:1:orders",
            "Message": "{\"id\": 1}", "Timestamp": "2023-11-14T22:13:20Z",
            "MessageAttributes": {"ce-type": {"Type": "String", "Value": "order.created"}, "b": {"Type": "Binary", "Value": "AA=="}}}"#;
        let inner = unwrap(body).expect("a notification");
        assert_eq!((inner.body.as_str(), inner.lossy), ("{\"id\": 1}", true));
        assert_eq!(inner.attributes, [("ce-type".to_owned(), "order.created".to_owned())]);
        assert_eq!(unwrap(r#"{"Type": "Order", "TopicArn": "arn:x", "Message": "m"}"#), None);
        assert_eq!(unwrap(r#"{"Message": "m"}"#), None);
        assert_eq!(unwrap("text"), None);
    }
}
