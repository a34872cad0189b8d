/* The least a user-space monitor can do for a port read: KVM_RUN, look at the reason, store the answer. */
#include <linux/kvm.h>
#include <sys/ioctl.h>

long reads(int vcpu, struct kvm_run *run, long count)
{
    for (long i = 0; i < count; i++) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0 || run->exit_reason != KVM_EXIT_IO)
            return i;
        *((unsigned char *)run + run->io.data_offset) = 0x60;
    }
    return count;
}
