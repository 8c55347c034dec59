//! The interrupt controllers and the timer.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::KvmError;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

pub(super) fn save_irqchips(vm: &VmFd) -> Result<[kvm_irqchip; 3], KvmError> {
    let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() });
    for chip in &mut chips {
        vm.get_irqchip(chip).map_err(KvmError::refused("read an interrupt controller"))?;
    }
    Ok(chips)
}

/// Each of the three, in their order, whatever numbers the other host wrote.
pub(super) fn load_irqchips(vm: &VmFd, chips: &[kvm_irqchip; 3]) -> Result<(), KvmError> {
    for (chip, chip_id) in chips.iter().zip(CHIPS) {
        let chip = kvm_irqchip { chip_id, ..*chip };
        vm.set_irqchip(&chip).map_err(KvmError::refused("write an interrupt controller"))?;
    }
    Ok(())
}

pub(super) fn save_pit(vm: &VmFd) -> Result<kvm_pit_state2, KvmError> {
    vm.get_pit2().map_err(KvmError::refused("read the timer"))
}

pub(super) fn load_pit(vm: &VmFd, pit: &kvm_pit_state2) -> Result<(), KvmError> {
    vm.set_pit2(pit).map_err(KvmError::refused("write the timer"))
}
