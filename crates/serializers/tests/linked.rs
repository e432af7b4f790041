//! A serializer of another crate (this one), known to the registry because it is linked.

mod common;

use common::{Custom, LIMITS, Order};
use polymq_serializers::{Accept, SerializerEntry, Serializers, inventory, register};

register!(Custom::new("by-macro", "application/vnd.test.macro", 501));

inventory::submit! {
    SerializerEntry::new(|| Custom::arc("by-hand", "application/vnd.test.hand", 500))
}

#[test]
fn linked_serializers_are_registered_in_the_order_of_their_ids() {
    let serializers = Serializers::linked().unwrap();
    let names: Vec<_> = serializers.names().collect();
    assert_eq!(names, ["json", "msgpack", "text", "bytes", "by-hand", "by-macro"]);
    assert!(Serializers::builtin().by_name("by-macro").is_err());
}

#[test]
fn a_linked_serializer_is_bound_encodes_and_decodes() {
    let mut serializers = Serializers::linked().unwrap();
    serializers.bind::<Order>("by-macro").unwrap();
    let order = Order { id: 7, note: Some("x".into()), lines: vec![("a".into(), -1)] };

    let sender = serializers.for_type::<Order>().unwrap();
    let body = sender.encode(&order, &LIMITS).unwrap();

    let receiver = serializers.resolve(&Accept::any(), Some(sender.content_type())).unwrap();
    assert_eq!(receiver, sender);
    assert_eq!(serializers.by_id(501), Some(sender));
    assert_eq!(receiver.decode::<Order>(&body, &LIMITS).unwrap(), order);
}

#[test]
fn a_linked_serializer_that_contradicts_another_is_refused() {
    let mut serializers = Serializers::linked().unwrap();
    let again = serializers.add(Custom::arc("by-macro", "application/vnd.test.other", 502)).unwrap_err();
    assert!(again.to_string().contains("application/vnd.test.macro"), "{again}");
}
