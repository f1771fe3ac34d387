// What a container runtime does with a network configuration list, by the library that runtimes use
// (libcni): ADD, CHECK, the cached result, DEL twice. Prints the result of the ADD.
//
// usage: libcni CONFLIST NETNS CONTAINER-ID BIN-DIR CACHE-DIR
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 5 {
		return fmt.Errorf("five arguments are needed")
	}
	list, err := libcni.ConfListFromFile(args[0])
	if err != nil {
		return fmt.Errorf("reading the list: %w", err)
	}
	config := libcni.NewCNIConfigWithCacheDir([]string{args[3]}, args[4], nil)
	runtime := &libcni.RuntimeConf{
		ContainerID: args[2],
		NetNS:       args[1],
		IfName:      "eth0",
		Args:        [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "web"}, {"K8S_POD_NAMESPACE", "ns"}},
		// No port mappings: the portmap of containernetworking-plugins 1.1.1 looks for its IPv4 rules
		// in the IPv6 table when it checks.
	}
	ctx := context.Background()
	if _, err := config.ValidateNetworkList(ctx, list); err != nil {
		return fmt.Errorf("validate: %w", err)
	}
	result, err := config.AddNetworkList(ctx, list, runtime)
	if err != nil {
		return fmt.Errorf("add: %w", err)
	}
	// CHECK came with 0.4.0.
	if !strings.HasPrefix(list.CNIVersion, "0.3.") {
		if err := config.CheckNetworkList(ctx, list, runtime); err != nil {
			return fmt.Errorf("check: %w", err)
		}
	}
	cached, err := config.GetNetworkListCachedResult(list, runtime)
	if err != nil || cached == nil {
		return fmt.Errorf("no cached result: %w", err)
	}
	if err := result.Print(); err != nil {
		return err
	}
	for i := 0; i < 2; i++ {
		if err := config.DelNetworkList(ctx, list, runtime); err != nil {
			return fmt.Errorf("del %d: %w", i+1, err)
		}
	}
	return nil
}
