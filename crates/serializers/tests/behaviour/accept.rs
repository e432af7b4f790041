//! Which labels a consumer decodes.
#![allow(clippy::unwrap_used, reason = "a helper of tests is a test")]

use crate::common::Custom;
use polymq_serializers::{Accept, DecodeError, Format, RegistryError, Serializers};

fn registry() -> Serializers {
    let mut serializers = Serializers::builtin();
    serializers.add(Custom::arc("own", "application/own", 100)).unwrap();
    serializers
}

#[test]
fn any_accepts_what_the_registry_knows() {
    let serializers = registry();
    for (content_type, name) in [
        ("application/json", "json"),
        (" application/json ", "json"),
        ("application/json; charset=utf-8", "json"),
        ("application/msgpack", "msgpack"),
        ("text/plain", "text"),
        ("application/octet-stream", "bytes"),
        ("application/own", "own"),
    ] {
        let format = serializers.resolve(&Accept::any(), Some(content_type)).unwrap();
        assert_eq!(format.name(), name);
    }
}

#[test]
fn an_unlabelled_body_is_refused_unless_a_format_was_set() {
    let serializers = registry();
    for label in [None, Some(""), Some("  ")] {
        let refused = serializers.resolve(&Accept::any(), label).unwrap_err();
        assert!(matches!(refused, DecodeError::Unlabelled { .. }));
        assert!(refused.to_string().contains("json, msgpack, text, bytes, own"), "{refused}");

        let accept = Accept::any().unlabelled_as("own");
        assert_eq!(serializers.resolve(&accept, label).unwrap().name(), "own");
    }
    let accept = Accept::any().unlabelled_as("own");
    assert_eq!(serializers.resolve(&accept, Some("application/json")).unwrap(), &Format::JSON);
}

#[test]
fn an_unknown_content_type_is_refused_even_where_a_default_was_set() {
    let serializers = registry();
    let accept = Accept::any().unlabelled_as("json");
    let refused = serializers.resolve(&accept, Some("application/x-java-serialized-object")).unwrap_err();
    assert!(matches!(refused, DecodeError::UnknownContentType { .. }));
    let sentence = refused.to_string();
    assert!(sentence.contains("\"application/x-java-serialized-object\""), "{sentence}");
    assert!(sentence.contains("application/own"), "{sentence}");
}

#[test]
fn a_registered_serializer_that_is_not_on_the_list_is_refused() {
    let serializers = registry();
    let accept = Accept::only(["json", "own"]);
    assert_eq!(serializers.resolve(&accept, Some("application/json")).unwrap(), &Format::JSON);
    assert_eq!(serializers.resolve(&accept, Some("application/own")).unwrap().name(), "own");
    let refused = serializers.resolve(&accept, Some("application/msgpack")).unwrap_err();
    assert!(matches!(&refused, DecodeError::NotAccepted { format, .. } if **format == *"msgpack"));
    assert!(refused.to_string().contains("accepted: json, own"), "{refused}");

    let nothing = Accept::only::<&str>([]);
    let refused = serializers.resolve(&nothing, Some("application/json")).unwrap_err();
    assert!(refused.to_string().contains("accepted: none"), "{refused}");

    let without_json = Accept::only(["msgpack"]);
    assert!(serializers.resolve(&without_json, Some("application/json")).is_err());
    assert!(serializers.resolve(&without_json, Some("application/x+json")).is_err());
}

#[test]
fn a_list_that_cannot_work_is_found_before_the_first_message() {
    let serializers = registry();
    assert_eq!(serializers.check(&Accept::any()), Ok(()));
    assert_eq!(serializers.check(&Accept::only(["json"]).unlabelled_as("json")), Ok(()));
    for accept in [Accept::only(["json", "jsn"]), Accept::any().unlabelled_as("jsn")] {
        assert!(matches!(serializers.check(&accept), Err(RegistryError::UnknownName { .. })));
    }
    let contradiction = Accept::only(["json"]).unlabelled_as("text");
    assert!(matches!(serializers.check(&contradiction), Err(RegistryError::Invalid { .. })));
    let refused = serializers.resolve(&contradiction, None).unwrap_err();
    assert!(matches!(refused, DecodeError::NotAccepted { .. }));
}

#[test]
fn a_long_label_is_shortened_in_the_error() {
    let label = format!("application/{}", "ä".repeat(10_000));
    let refused = registry().resolve(&Accept::any(), Some(&label)).unwrap_err();
    assert!(refused.to_string().len() < 500);
}
